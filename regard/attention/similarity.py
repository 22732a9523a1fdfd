"""Attention by a similarity other than the exponential, with or without normalisation.

    A_ij = f(scale * q_i . k_j)  over visible keys j,  f = sigmoid, or elu + 1
    normalised:  A_ij / (sum_l A_il + 1e-8)

Without normalisation a row need not put its weight anywhere, and in the paper's training no attention sink
emerges; with it one does. Rows then do not sum to 1: `Sinks(proxy=True)` measures them.

Source: Gu et al., 2024, arXiv 2410.10781, on attention operations. Status: agrees with the official code
(sail-sg/Attention-Sink, `lit_gpt/model_attn_sim.py`). It reads the model's ordinary cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.checks import refuse_nan
from regard.attention.matrices import dense_mask, score_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec, mechanism
from regard.engines.reshaped import attend_reshaped
from regard.errors import RegardError

TINY = 1e-8


def _elu(scores: Tensor) -> Tensor:
    return F.elu(scores) + 1


SIMILARITIES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "elu": _elu}


def similarity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str = "sigmoid",
    normalise: bool = False,
    causal: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Return attention whose weights are a function of each score alone.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        kind: "sigmoid", or "elu" for elu + 1.
        normalise: divide each row by its sum.
        causal: whether a row sees no later key.
        valid: bool [B, S], False at padding.

    Returns:
        [B, H, T, Dv], in the dtype of v.

    Raises:
        RegardError: for a kind that is not known.
        ShapeMismatch: where q, k and valid do not fit.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> similarity_attention(q, k, torch.ones(1, 1, 4, 1)).flatten()
        tensor([0.5000, 1.0000, 1.5000, 2.0000])
    """
    refuse_nan(q=q, k=k, v=v)
    layer = Similarity(kind=kind, normalise=normalise).build()
    return layer(q, k, v, Context.of(q, k, causal=causal, valid=valid))


class SimilarityAttention(Mechanism):
    """Attention by a similarity of each query and key; the module of `Similarity`."""

    honours = frozenset({"mask", "bias", "softcap"})

    def __init__(self, kind: str, normalise: bool) -> None:
        super().__init__()
        self.kind, self.normalise = kind, normalise

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        weights = SIMILARITIES[self.kind](score_matrix(q, k, ctx, dense_mask(ctx, q.device)))
        return weights / (weights.sum(-1, keepdim=True) + TINY) if self.normalise else weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        reshape = partial(_weights, similarity=SIMILARITIES[self.kind], normalise=self.normalise)
        return attend_reshaped(self.context(q, k, ctx).inputs(q, k, v), reshape)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, normalise={self.normalise}"


def _weights(scores: Tensor, similarity: Callable[[Tensor], Tensor], normalise: bool) -> Tensor:
    weights = similarity(scores)
    return weights / (weights.sum(-1, keepdim=True) + TINY) if normalise else weights


@mechanism("similarity")
@dataclass(frozen=True, kw_only=True)
class Similarity(Spec):
    """Attention by sigmoid or elu + 1 of the scores; not normalised, no sink emerges.

    Attributes:
        kind: "sigmoid", or "elu" for elu + 1.
        normalise: divide each row by its sum.

    Example:
        >>> Similarity(kind="elu", normalise=True).build()
        SimilarityAttention(kind='elu', normalise=True)
    """

    module: ClassVar = SimilarityAttention
    kind: str = "sigmoid"
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SIMILARITIES:
            raise RegardError(f"kind is {self.kind!r}; it must be one of {', '.join(SIMILARITIES)}.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return tuple(cls(kind=kind, normalise=n) for kind in SIMILARITIES for n in (False, True))
