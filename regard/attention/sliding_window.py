"""Softmax attention in a window.

    row i sees keys j with 0 <= i - j < window           causal
    row i sees keys j with |i - j| < window              otherwise

and of those only what the model's own mask lets it see; scale, soft-cap, bias and sink logits are the
model's. Distances count padded positions, which a sequence has at one end only.

Source: Beltagy et al., 2020, arXiv 2004.05150, section 3.1; the count of keys, the row's own included, is
that of Mistral (Jiang et al., 2023, arXiv 2310.06825, section 2). Status: agrees with the sliding-window
masks of transformers. It reads the model's ordinary cache, and keeps all of it.

Operations and memory O(T * window).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from regard.attention.costs import Costs
from regard.attention.matrices import dense_mask, softmax_matrix
from regard.attention.mechanism import Context, LookedAt, Mechanism
from regard.attention.registry import Spec, get, mechanism
from regard.engines.bands import attend_by_blocks
from regard.engines.masks import WindowMask, unhidden
from regard.errors import RegardError

MIN_ROWS, MAX_ROWS = 64, 512


class SlidingWindowAttention(Mechanism):
    """Softmax attention in a window; the module of `SlidingWindow`."""

    honours = frozenset({"mask", "bias", "softcap", "sink_logits"})

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def context(self, q: Tensor, k: Tensor, ctx: Context | None) -> Context:
        ctx = super().context(q, k, ctx)
        return replace(ctx, mask=WindowMask(ctx.mask, self.window, ctx.offset, both=not ctx.causal))

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        narrow = self.context(q, k, ctx)
        return softmax_matrix(q, k, narrow, dense_mask(narrow, q.device))

    def looked_at(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> LookedAt:
        mask, keys = self.context(q, k, ctx).mask, k.shape[2]

        def rows(start: int, stop: int) -> Tensor:
            seen = mask.rows(start, stop, 0, keys)
            if seen is None:
                return torch.ones(1, 1, stop - start, keys, dtype=torch.bool, device=q.device)
            return unhidden(seen).expand(-1, -1, stop - start, -1).to(q.device)

        return rows

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        narrow = self.context(q, k, ctx)
        rows = max(MIN_ROWS, min(MAX_ROWS, self.window))
        return attend_by_blocks(narrow.inputs(q, k, v), rows)


@mechanism("sliding-window")
@dataclass(frozen=True)
class SlidingWindow(Spec):
    """Softmax attention of every row to the `window` last keys, itself included.

    Attributes:
        window: number of keys, from 1.

    Example:
        >>> SlidingWindow(256).to_dict()
        {'mechanism': 'sliding-window', 'window': 256}
    """

    module: ClassVar = SlidingWindowAttention
    costs: ClassVar = Costs(time="T w D", memory="w", step_time="w D", step_memory="T D")
    window: int

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise RegardError(f"window is {self.window!r}; it must be a number of keys, from 1.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(2), cls(5)

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(max(1, length)), get("softmax")
