"""Softplus attention with a scale that knows the length (LSSA), and with re-weighting (LSSAR).

    q, k <- q / |q|, k / |k|                              row by row, after rotary embedding
    Z_ij = log(D) log(m_i) q_i . k_j                      m_i: number of keys that row i may see
    A = softplus(Z) on visible keys, 0 elsewhere;  A <- A / sum_j A                          LSSA
    X = relu(m_i A - o_i),  o_i = 1, and 0 where m_i <= 3
    A <- X^p / sum_j X^p                                                                     LSSAR

The mean weight of a row is 1 / m_i, so what is below the mean is dropped, and p sharpens the rest. X is
divided by its largest entry first, so that nothing overflows or vanishes. Where all weights of a row are
equal to 1e-5, X is but rounding: the row keeps the weights it had before, and `uniform_rows` counts it.

Source: Gao and Spratling, 2025, arXiv 2501.13428. Status: paper only; the official code could not be had.
`activation` puts exp, sigmoid or relu in the place of softplus. The scale that a model has is not used.

Operations and memory as softmax attention by blocks of rows. It reads the model's ordinary cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.checks import check_call, check_positive
from regard.attention.matrices import dense_mask, score_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec, mechanism
from regard.attention.visible import visible_keys
from regard.engines.masks import CausalMask, Mask, TensorMask
from regard.engines.reshaped import attend_reshaped
from regard.errors import RegardError, ShapeMismatch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}
IMPLS = ("rows", "matrix")
FIRST, FLAT = 3, 1e-5


def l1_normalise(weights: Tensor) -> Tensor:
    """Divide each row of weights by its sum; a row of zeros stays one.

    Args:
        weights: [..., T, S], not negative.

    Example:
        >>> l1_normalise(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist()
        [[0.25, 0.75], [0.0, 0.0]]
    """
    return weights / _nonzero(weights.sum(-1, keepdim=True))


def reweight(weights: Tensor, counts: Tensor, p: float) -> Tensor:
    """Drop the weights of each row that are below its mean, and raise the rest to a power.

    Args:
        weights: [..., T, S], rows of sum 1 or 0, of any attention.
        counts: m, the number of keys that each row may see, broadcastable to [..., T].
        p: the power, above 0.

    Returns:
        Weights of the same shape, rows of sum 1 or 0; a row whose weights are all equal stays as it is.

    Example:
        >>> reweight(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([4]), 1.0)
        tensor([[0.0000, 0.0000, 0.2500, 0.7500]])
    """
    check_positive("p", p)
    over = torch.relu(counts[..., None] * weights - _floor(counts[..., None], weights))
    peak = over.detach().amax(-1, keepdim=True) if weights.shape[-1] else over.new_zeros(*over.shape[:-1], 1)
    flat = peak <= FLAT
    sharp = l1_normalise(_raised(over / torch.where(flat, 1.0, peak), p))
    return torch.where(flat, weights, sharp)


def softplus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    reweight: float | None = None,
    query_offset: int = 0,
    activation: str = "softplus",
    impl: str = "rows",
) -> Tensor:
    """Return softplus attention [B, H, T, Dv], re-weighted where `reweight` is a power.

    Args:
        q: [B, H, T, D], after rotary embedding, where there is any.
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        mask: [T, S] or [B|1, H|1, T, S], True where visible, or 0 there and -inf elsewhere.
        causal: whether a row sees no key after it, besides what `mask` hides.
        reweight: the power p; None for LSSA, without re-weighting.
        query_offset: row i stands at key i + `query_offset`, as in decoding with a cache; only with causal.
        activation: "softplus", or "exp", "sigmoid" or "relu" in its place.
        impl: "rows", by blocks of rows, or "matrix", the definition.

    Raises:
        ShapeMismatch: where the tensors do not fit together.
        RegardError: for NaN or infinity, a mask with other numbers, or an option that will not do.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> whole = softplus_attention(q, k, v, causal=True, reweight=15.0)
        >>> last = softplus_attention(q[:, :, 4:], k, v, causal=True, reweight=15.0, query_offset=4)
        >>> torch.allclose(last, whole[:, :, 4:], atol=1e-6)
        True
    """
    check_call(q, k, v)
    if impl not in IMPLS:
        raise RegardError(
            f"impl is {impl!r}; it must be rows or matrix: fused kernels such as those of SDPA and "
            "FlashAttention take a softmax, and softplus attention needs the whole row."
        )
    spec = LSSA(activation=activation)
    if reweight is not None:
        spec = LSSAR(activation=activation, p_train=reweight, p_eval=reweight)
    attention: SoftplusAttentionHeads = spec.build()
    ctx = _context(q, k, mask, causal, query_offset)
    found = attention(q, k, v, ctx) if impl == "rows" else attention.reference(q, k, v, ctx)
    return found.to(v.dtype)


def _context(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, offset: int) -> Context:
    rows, keys = q.shape[2], k.shape[2]
    if not causal and offset:
        raise RegardError(f"query_offset is {offset}, and says nothing without causal=True.")
    if causal and not 0 <= offset <= keys - rows:
        raise ShapeMismatch(
            f"{rows} causal queries at query_offset {offset} need {rows + offset} keys, and there are {keys}."
        )
    order: Mask = CausalMask(rows, keys, offset, q.device) if causal else Mask(rows, keys)
    if mask is None:
        return Context(mask=order, causal=causal, offset=offset)
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or any(
        n not in (1, whole) for n, whole in zip(shape, (*q.shape[:2], rows, keys), strict=True)
    ):
        raise ShapeMismatch(
            f"mask must be [{rows}, {keys}] or [B|1, H|1, {rows}, {keys}], and is {list(mask.shape)}."
        )
    whole = mask.view(shape).expand(-1, -1, rows, keys)
    below = order.rows(0, rows, 0, keys)
    if below is not None and mask.dtype == torch.bool:
        whole = whole & below
    elif below is not None:
        whole = whole.masked_fill(~below, -torch.inf)
    return Context(mask=TensorMask(whole, rows, keys), causal=causal, offset=offset, plain=False)


class SoftplusAttentionHeads(Mechanism):
    """Softplus attention; the module of `LSSA` and `LSSAR`.

    Attributes:
        uniform_rows: of how many rows of the last `forward`, over batch and heads, all weights were equal,
            so that they were not re-weighted.
    """

    honours = frozenset({"mask"})

    def __init__(
        self, activation: str = "softplus", p_train: float | None = None, p_eval: float | None = None
    ) -> None:
        super().__init__()
        self.activation, self.p_train, self.p_eval = activation, p_train, p_eval
        self._uniform: Tensor | None = None

    @property
    def power(self) -> float | None:
        """p as it is now, in training or not."""
        return self.p_train if self.training else self.p_eval

    @property
    def uniform_rows(self) -> int:
        return 0 if self._uniform is None else int(self._uniform)

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        counts = visible_keys(ctx, q, k)
        q, k = _scaled(q, counts), _unit(k)
        scores = score_matrix(q, k, replace(ctx, scale=1.0), dense_mask(ctx, q.device))
        weights = l1_normalise(ACTIVATIONS[self.activation](scores))
        return weights if self.power is None else reweight(weights, counts, self.power)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        counts = visible_keys(ctx, q, k)
        found: list[Tensor] = []
        reshape = _Reshape(ACTIVATIONS[self.activation], self.power, found)
        inputs = replace(ctx, scale=1.0).inputs(_scaled(q, counts), _unit(k), v)
        out = attend_reshaped(inputs, reshape, beside=counts[..., None])
        self._uniform = torch.stack(found).sum() if found else None
        return out


@dataclass(frozen=True, eq=False)
class _Reshape:
    """From scores [B, H, R, K] and counts [B|1, H|1, R, 1] to weights.

    Attributes:
        activation: from scores to weights that are not normalised.
        power: p, or None to stop before the re-weighting.
        found: gets the number of rows that were not re-weighted, one a call.
    """

    activation: Callable[[Tensor], Tensor]
    power: float | None
    found: list[Tensor]

    def __call__(self, scores: Tensor, counts: Tensor) -> Tensor:
        weights = self.activation(scores)
        total = weights.sum(-1, keepdim=True)
        some = total.detach() > 0
        total = torch.where(some, total, 1.0)
        if self.power is None:
            return weights / total
        # (m A - o) / max (m A - o) = (a - c) / max (a - c), with a not normalised and c = o sum a / m
        mean = total / counts.clamp(min=1)
        least = _floor(counts, weights) * mean
        peak = (weights.detach().amax(-1, keepdim=True) - least.detach()).clamp(min=0)
        flat = peak <= FLAT * mean.detach()
        self.found.append((flat & some).sum())
        before = weights / total if bool(flat.any()) else None
        scale = 1 / torch.where(flat, 1.0, peak)
        if weights.requires_grad:
            raised = _raised((weights - least).relu() * scale, self.power)
            raised = raised / _nonzero(raised.sum(-1, keepdim=True))
        else:
            raised = _raised_(weights.sub_(least).relu_().mul_(scale), self.power)
            raised = raised.mul_(1 / _nonzero(raised.sum(-1, keepdim=True)))
        return raised if before is None else torch.where(flat, before, raised)


def _floor(counts: Tensor, like: Tensor) -> Tensor:
    """o: 1, and 0 in the first rows, where every key counts."""
    return (counts > FIRST).to(like.dtype)


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


def _raised(x: Tensor, p: float) -> Tensor:
    """x^p of numbers from 0 to 1, with a gradient of 0 at 0 also for p below 1."""
    if p >= 1:
        return x.pow(p)
    there = x > 0
    return torch.where(there, x, 1.0).pow(p) * there


def _raised_(x: Tensor, p: float) -> Tensor:
    """The same in place, by multiplications where p is a small whole number."""
    if p != int(p) or p > 64:
        return x.pow_(p)
    exponent, result = int(p), None
    while exponent > 1:
        if exponent % 2:
            result = x.clone() if result is None else result.mul_(x)
        x.mul_(x)
        exponent //= 2
    return x if result is None else x.mul_(result)


def _unit(x: Tensor) -> Tensor:
    """x over its norm, in float32 or, from float64, float64; a row of zeros stays one, and has a gradient."""
    x = x if x.dtype == torch.float64 else x.float()
    return x / _nonzero(x.norm(dim=-1, keepdim=True))


def _scaled(q: Tensor, counts: Tensor) -> Tensor:
    q = _unit(q)
    return q * (math.log(max(1, q.shape[-1])) * counts.clamp(min=1).to(q.dtype).log())[..., None]


@mechanism("lssa")
@dataclass(frozen=True, kw_only=True)
class LSSA(Spec):
    """Length-scaled softplus attention: softplus and L1 in the place of softmax, over normalised q and k.

    Attributes:
        activation: "softplus", or "exp", "sigmoid" or "relu" in its place.
    """

    module: ClassVar = SoftplusAttentionHeads
    activation: str = "softplus"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise RegardError(
                f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}."
            )

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return tuple(cls(activation=name) for name in ACTIVATIONS)


@mechanism("lssar")
@dataclass(frozen=True, kw_only=True)
class LSSAR(LSSA):
    """Softplus attention with re-weighting: drop what is below the mean of a row, raise the rest to a power.

    Attributes:
        p_train: the power in training; None for none, which is LSSA.
        p_eval: the power otherwise. The paper has 3 as best at the length trained on, 15 for longer texts.

    Example:
        >>> attention = LSSAR(p_train=3.0).build()
        >>> attention.power, attention.eval().power
        (3.0, 15.0)
    """

    p_train: float | None = 15.0
    p_eval: float | None = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("p_train", self.p_train), ("p_eval", self.p_eval)):
            if value is not None:
                check_positive(name, value)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(), cls(p_train=3.0), cls(p_train=0.5), cls(activation="exp"), cls(activation="sigmoid")
