"""Neighbourhood attention of a sequence, as a mechanism that stands in the place of softmax attention.

Causal, row i sees keys i, i - d, .., i - (k - 1) d; otherwise the k nearest that are i modulo d, moved inside
at the ends, all by position among the valid tokens. A sequence shorter than the window sees all of itself.
It reads the model's ordinary cache, and of that, in decoding, k keys.

Source: Hassani et al., 2024, arXiv 2403.04690. Status: agrees with the official code on sequences that its
windows fit into; what is shorter, or padded, is our choice: a batch is cut to its valid tokens, item by item.
Strides are left to `na1d`: with one, the window of the last queries would depend on how many come after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.costs import Costs
from regard.attention.matrices import softmax_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.neighborhood.rules import options_of
from regard.attention.registry import Spec, get, mechanism
from regard.engines.grids import Axis
from regard.engines.neighborhoods import attend_neighborhoods
from regard.errors import ShapeMismatch


class NeighborhoodHeads(Mechanism):
    """Attention to the nearest keys of a sequence; the module of `Neighborhood`."""

    def __init__(self, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation

    def refuses(self, ctx: Context) -> str | None:
        words = super().refuses(ctx)
        return "dropout on its weights" if words is None and ctx.dropout else words

    def context(self, q: Tensor, k: Tensor, ctx: Context | None) -> Context:
        ctx = super().context(q, k, ctx)
        if not ctx.causal and q.shape[2] != k.shape[2]:
            raise ShapeMismatch(
                f"neighbours are found on one sequence, and there are {q.shape[2]} queries and {k.shape[2]} "
                "keys."
            )
        return ctx

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        first = ctx.offset if ctx.causal else 0
        seen = [self._visible(len(places), ctx.causal) for places in self._places(k, ctx)]
        mask = torch.zeros(len(seen), 1, k.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
        for item, (places, near) in enumerate(zip(self._places(k, ctx), seen, strict=True)):
            mask[item, 0, places[:, None], places] = near.to(k.device)
        return softmax_matrix(q, k, ctx, mask[:, :, first : first + q.shape[2]])

    def _visible(self, length: int, causal: bool) -> Tensor:
        return Axis(length, self.kernel_size, 1, self.dilation, causal).visible()

    @staticmethod
    def _places(k: Tensor, ctx: Context) -> list[Tensor]:
        """The valid keys of each item of the batch, or of all."""
        if ctx.valid_keys is None:
            return [torch.arange(k.shape[2], device=k.device)]
        return [valid.nonzero()[:, 0] for valid in ctx.valid_keys]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        if ctx.valid_keys is None:
            return self._attend(q, k, v, ctx.causal, scale)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        if not out.numel():
            return out
        first = ctx.offset if ctx.causal else 0
        kinds, kind_of = ctx.valid_keys.unique(dim=0, return_inverse=True)
        for kind, valid in enumerate(kinds):
            items, keys = (kind_of == kind).nonzero()[:, 0], valid.nonzero()[:, 0]
            rows = valid[first : first + q.shape[2]].nonzero()[:, 0]
            parts = (q[items][:, :, rows], k[items][:, :, keys], v[items][:, :, keys])
            found = self._attend(*parts, ctx.causal, scale)
            out = out.index_put(
                (items[:, None, None], torch.arange(q.shape[1], device=q.device)[:, None], rows), found
            )
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        if causal and q.shape[2] < k.shape[2]:
            return attend_last(q, k, v, self.kernel_size, self.dilation, scale)
        axis = Axis(k.shape[2], self.kernel_size, 1, self.dilation, causal)
        return _along(q, k, v, axis, scale)


def attend_last(q: Tensor, k: Tensor, v: Tensor, kernel: int, dilation: int, scale: float) -> Tensor:
    """Return causal attention of the last positions to their neighbours, [B, H, T, Dv]; only those are read.

    Args:
        q: [B, H, T, D], the last T positions.
        k, v: [B, Hkv, S, D] and [B, Hkv, S, Dv], of all S >= T positions, or of so many as T queries reach.
        kernel, dilation: as in `na1d`.
        scale: factor on q k^T.
    """
    rows, keys = q.shape[2], k.shape[2]
    if rows == 1:
        count = min(kernel, (keys - 1) // dilation + 1)
        k, v = (x[:, :, keys - 1 - (count - 1) * dilation :: dilation] for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    first = max(0, keys - rows - (kernel - 1) * dilation) // dilation * dilation
    before = keys - rows - first
    axis = Axis(keys - first, kernel, 1, dilation, True)
    out = _along(F.pad(q, (0, 0, before, 0)), k[:, :, first:], v[:, :, first:], axis, scale)
    return out[:, :, before:]


def _along(q: Tensor, k: Tensor, v: Tensor, axis: Axis, scale: float) -> Tensor:
    """Attention of a sequence, [B, H, T, Dv]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend_neighborhoods(q, k, v, (axis,), scale=scale)[0].transpose(1, 2)


@mechanism("neighborhood")
@dataclass(frozen=True)
class Neighborhood(Spec):
    """Softmax attention of every row to its `kernel_size` nearest keys, moved inside where the sequence ends.

    Attributes:
        kernel_size: number of keys, from 2.
        dilation: distance between them.

    Example:
        >>> Neighborhood(128, dilation=2).to_dict()
        {'mechanism': 'neighborhood', 'kernel_size': 128, 'dilation': 2}
    """

    module: ClassVar = NeighborhoodHeads
    costs: ClassVar = Costs(time="T k D", memory="k", step_time="k D", step_memory="T D")
    kernel_size: int
    dilation: int = 1

    def __post_init__(self) -> None:
        options_of(1, self.kernel_size, 1, self.dilation)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(3), cls(6), cls(4, dilation=3)

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(max(2, length)), get("softmax")
