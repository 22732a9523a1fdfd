"""Clipped softmax: stretched and clipped, so that a row can give some keys, or all of them, exactly nothing.

    C(x) = clip((zeta - gamma) * softmax(x) + gamma, 0, 1),   zeta >= 1, gamma <= 0          row by row
    gamma = -alpha / L                                        L the length of training, not of this text

A key is given 0 where its softmax is at most alpha / (L + alpha), at a finite distance of scores. Clipped
weights have no gradient, and nothing is normalised again: rows sum to less than 1.

Source: Bondarenko et al., 2023, arXiv 2306.12929, section 4.1, equation 4. Status: agrees with the official
code (Qualcomm-AI-research/outlier-free-transformers, whose `eta` is zeta). Its function's own defaults, gamma
-0.1 and zeta 1.1, are no recipe of the paper's, and here nothing is assumed.

With alpha > 1 a row of equal scores over L keys is clipped whole, output and gradient: let alpha grow from
0 (`ClippedSoftmaxAttention.set`), or watch the empty rows. A row of fewer keys is clipped less.
It reads the model's ordinary cache. Fused kernels cannot clip, so rows are opened a block at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from regard.attention.checks import refuse_nan
from regard.attention.matrices import dense_mask, softmax_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec, get, mechanism
from regard.engines.reshaped import attend_reshaped
from regard.errors import RegardError

PRESETS = {"bert": (-0.025, 1.0), "opt": (-12 / 512, 1.0)}


def clip_range(
    alpha: float | None, length: int | None, gamma: float | None, zeta: float = 1.0
) -> tuple[float, float]:
    """Return (gamma, zeta) from either alpha and the length of training, or gamma itself.

    Raises:
        RegardError: where neither or both are given, or one is out of range.
    """
    if (alpha is None) == (gamma is None):
        raise RegardError("clipped softmax takes either alpha with length, or gamma; give one of the two.")
    if not math.isfinite(zeta) or zeta < 1:
        raise RegardError(f"zeta is {zeta}; it must be at least 1.")
    if gamma is not None:
        if length is not None:
            raise RegardError("length goes with alpha; gamma is taken as it is.")
        if not math.isfinite(gamma) or gamma > 0:
            raise RegardError(f"gamma is {gamma}; it must be at most 0.")
        return float(gamma), float(zeta)
    assert alpha is not None
    if not math.isfinite(alpha) or alpha < 0:
        raise RegardError(f"alpha is {alpha}; it must be at least 0.")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise RegardError(
            f"alpha needs the length of training, a number of keys from 1, and length is {length!r}; it is "
            "not taken from the text at hand, for a longer one would then be clipped less."
        )
    return -alpha / length, float(zeta)


def clipped_softmax(
    scores: Tensor,
    *,
    alpha: float | None = None,
    length: int | None = None,
    gamma: float | None = None,
    zeta: float = 1.0,
    dim: int = -1,
) -> Tensor:
    """Return clip((zeta - gamma) softmax(scores) + gamma, 0, 1).

    Args:
        scores: any shape; keys that are hidden at -inf, or the lowest number of the dtype.
        alpha: with `length`, stands for gamma = -alpha / length.
        length: number of keys in training.
        gamma: at most 0, in place of alpha.
        zeta: at least 1.
        dim: along which the softmax is taken.

    Returns:
        Weights from 0 to 1, of the shape and dtype of `scores`.

    Raises:
        RegardError: where alpha, gamma or zeta are out of range, or alpha has no length.

    Example:
        >>> import torch
        >>> clipped_softmax(torch.tensor([4.0, 1.0, 0.0]), alpha=0.5, length=3)
        tensor([0.9256, 0.0000, 0.0000])
    """
    gamma, zeta = clip_range(alpha, length, gamma, zeta)
    return _stretched(scores.softmax(dim), gamma, zeta)


def clipped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | None = None,
    length: int | None = None,
    gamma: float | None = None,
    zeta: float = 1.0,
    causal: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Return attention by clipped softmax.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        alpha, length, gamma, zeta: as for `clipped_softmax`.
        causal: whether a row sees no later key.
        valid: bool [B, S], False at padding.

    Returns:
        [B, H, T, Dv], in the dtype of v.

    Raises:
        RegardError: as for `clipped_softmax`.
        ShapeMismatch: where q, k and valid do not fit.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> clipped_attention(q, k, v, alpha=0.5, length=5).shape
        torch.Size([1, 2, 5, 8])
    """
    refuse_nan(q=q, k=k, v=v)
    layer = ClippedSoftmax(alpha=alpha, length=length, gamma=gamma, zeta=zeta).build()
    return layer(q, k, v, Context.of(q, k, causal=causal, valid=valid))


class ClippedSoftmaxAttention(Mechanism):
    """Softmax attention with clipped weights; the module of `ClippedSoftmax`.

    Attributes:
        gamma, zeta: what is in force; `set` changes them, as where alpha grows in training.
    """

    honours = frozenset({"mask", "bias", "softcap", "sink_logits"})

    def __init__(self, gamma: float, zeta: float) -> None:
        super().__init__()
        self.gamma, self.zeta = clip_range(None, None, gamma, zeta)

    def set(self, *, alpha: float, length: int) -> None:
        """Clip by alpha and length from now on.

        Raises:
            RegardError: as for `clipped_softmax`.
        """
        self.gamma, _ = clip_range(alpha, length, None)

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        weights = softmax_matrix(q, k, ctx, dense_mask(ctx, q.device))
        return _stretched(weights, self.gamma, self.zeta)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        inputs = self.context(q, k, ctx).inputs(q, k, v)
        width = self.zeta - self.gamma
        low, high = -self.gamma / width, (1 - self.gamma) / width
        return attend_reshaped(inputs, partial(_shrunk, low=low, high=high)) * width

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, zeta={self.zeta:g}"


def _stretched(weights: Tensor, gamma: float, zeta: float) -> Tensor:
    return ((zeta - gamma) * weights + gamma).clamp(0, 1)


def _shrunk(scores: Tensor, low: float, high: float) -> Tensor:
    """Return clip(softmax(scores), low, high) - low: clipped softmax, not yet stretched."""
    weights = F.softshrink(scores.softmax(-1), low)
    return weights if high >= 1 else weights.clamp_max(high - low)


@mechanism("clipped")
@dataclass(frozen=True, kw_only=True)
class ClippedSoftmax(Spec):
    """Softmax attention whose small weights are exactly 0, so that a head can do nothing.

    Attributes:
        alpha: how much is clipped, relative to equal weights; 0.5 to 1 is safe at any length, BERT was
            trained with 3.2.
        length: number of keys in training; fixed, also where a text is longer or a cache is filled.
        gamma: at most 0, in place of alpha and length.
        zeta: at least 1; 1 is what the paper recommends.
        preset: "bert" or "opt", the values of the official scripts (gamma -0.025, trained at 128; alpha
            12 at 512), in place of the others.

    Example:
        >>> ClippedSoftmax(alpha=0.5, length=512).build()
        ClippedSoftmaxAttention(gamma=-0.000976562, zeta=1)
    """

    module: ClassVar = ClippedSoftmaxAttention
    alpha: float | None = None
    length: int | None = None
    gamma: float | None = None
    zeta: float = 1.0
    preset: str | None = None

    def __post_init__(self) -> None:
        self.range()

    def range(self) -> tuple[float, float]:
        """Return (gamma, zeta)."""
        if self.preset is None:
            return clip_range(self.alpha, self.length, self.gamma, self.zeta)
        if self.preset not in PRESETS:
            raise RegardError(f"preset is {self.preset!r}; it must be one of {', '.join(PRESETS)}.")
        if (self.alpha, self.length, self.gamma, self.zeta) != (None, None, None, 1.0):
            raise RegardError(f"preset {self.preset!r} says it all; leave alpha, length, gamma and zeta out.")
        return PRESETS[self.preset]

    def build(self, site: Any = None) -> ClippedSoftmaxAttention:
        return ClippedSoftmaxAttention(*self.range())

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(alpha=0.5, length=19), cls(gamma=-0.1, zeta=1.1), cls(preset="bert")

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(alpha=0.0, length=max(1, length)), get("softmax")
