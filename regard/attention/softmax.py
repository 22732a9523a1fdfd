"""Softmax attention, as Vaswani et al. define it and as today's models extend it.

    S = softcap(scale * q k^T) + bias           [B, H, T, S]
    A = softmax(S, over visible keys and the sink logit)
    out = A v                                   [B, H, T, Dv]

Source: Vaswani et al., 2017, arXiv 1706.03762, equation 1. Status: agrees with the official code of the
models that use it. It reads the model's ordinary cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from regard.attention.matrices import dense_mask, softmax_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec, mechanism
from regard.engines.rows import attend


class SoftmaxAttention(Mechanism):
    """Plain softmax attention; the module of `Softmax`."""

    honours = frozenset({"mask", "bias", "softcap", "sink_logits"})

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        return softmax_matrix(q, k, ctx, dense_mask(ctx, q.device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        return attend(self.context(q, k, ctx).inputs(q, k, v))


@mechanism("softmax")
@dataclass(frozen=True)
class Softmax(Spec):
    """Plain softmax attention. Swapped in, it changes nothing: the control of every other mechanism."""

    module: ClassVar = SoftmaxAttention
