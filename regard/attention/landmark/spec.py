"""Landmark attention over a whole text: every L-th token is a landmark that gates its block.

    weight(j) = a_j                     token j of the block of the row
    weight(j) = a_landmark(b) w_j       token j of an earlier block b;   0 of landmarks

with a the softmax over the tokens of the own block and the landmarks of earlier ones, w the softmax inside a
block; `groups.py` has all of it. This is what a model is trained with; `memory.py` reads few blocks.

Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.1. Status: agrees with the official code.
Operations O(T^2 D), memory O(T^2 / L) with gradients. It reads the model's ordinary cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.attention.costs import Costs
from regard.attention.landmark.fast import Regular, attend_regular
from regard.attention.landmark.groups import grouped_softmax
from regard.attention.landmark.rows import without_padding
from regard.attention.matrices import dense_mask, score_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec, get, mechanism
from regard.engines.rows import expand_heads
from regard.errors import RegardError


def regular_landmarks(ctx: Context, k: Tensor, block: int) -> Tensor:
    """Return which keys are landmarks, bool [B, S]: the last of every `block` valid ones."""
    if ctx.valid_keys is None:
        marks = torch.arange(1, k.shape[2] + 1, device=k.device) % block == 0
        return marks.expand(k.shape[0], -1)
    return ctx.valid_keys & (ctx.valid_keys.cumsum(-1) % block == 0)


class LandmarkHeads(Mechanism):
    """Landmark attention with regular landmarks; the module of `Landmark`."""

    orders = frozenset({"causal"})

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        return self.grouped(q, k, ctx)[0]

    def grouped(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights [B, H, T, S], and the gate of each closed block [B, H, T, N]."""
        ctx = self.context(q, k, ctx)
        mask = dense_mask(ctx, q.device)
        visible = torch.ones(1, dtype=torch.bool, device=q.device) if mask is None else mask
        if visible.dtype != torch.bool:
            visible = visible > torch.finfo(visible.dtype).min
        return grouped_softmax(score_matrix(q, k, ctx, None), regular_landmarks(ctx, k, self.block), visible)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        if ctx.dropout:
            weights = torch.nn.functional.dropout(self.matrix(q, k, ctx), ctx.dropout)
            return (weights @ expand_heads(v, q.shape[1]).to(weights.dtype)).to(v.dtype)

        def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            how = Regular(self.block, k.shape[2] - q.shape[2], scale_of(ctx, q))
            return attend_regular(q, k, v, how)[0]

        return without_padding(work, q, k, v, ctx).to(v.dtype)


def scale_of(ctx: Context, q: Tensor) -> float:
    """The factor on scores."""
    return float(q.shape[-1]) ** -0.5 if ctx.scale is None else ctx.scale


def check_block(block: int) -> None:
    """Refuse what is no length of a block."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 2:
        raise RegardError(
            f"block is {block!r}; it must be from 2: tokens, and the landmark that closes them."
        )


@mechanism("landmark-attention")
@dataclass(frozen=True)
class Landmark(Spec):
    """Softmax attention in blocks closed by landmark tokens, which gate how much of their block is read.

    Attributes:
        block: tokens in a block, its landmark included; the paper has 51, its code for Llama 64.

    Example:
        >>> Landmark(64).to_dict()
        {'mechanism': 'landmark-attention', 'block': 64}
    """

    module: ClassVar = LandmarkHeads
    costs: ClassVar = Costs(time="T^2 D", memory="T^2 / L", step_time="T D", step_memory="T D")
    block: int = 64

    def __post_init__(self) -> None:
        check_block(self.block)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(2), cls(5)

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(length + 2), get("softmax")
