"""The systems of attention, linear attention, state-space models and gated recurrences, one function a row.

Each takes what its mixer computes from the input, such as queries, keys and gates, and returns the system
from values u [*batch, L, d] to outputs [*batch, L, d], frozen there. States are ordered channel by channel:
n entries for channel 0, then for channel 1; I is over the d channels, (x) the Kronecker product.

    row                   Lambda_i                          B_i                  C_i
    linear attention      I                                 I (x) k_i            1/eta_i I (x) q_i^T
      the same, decaying  eta_{i-1}/eta_i I                 1/eta_i I (x) k_i    I (x) q_i^T
    lightning             lambda I                          I (x) k_i            I (x) q_i^T
    LightNet              I (x) diag(exp(z_{i-1} - z_i))    I (x) exp(k_i - z_i) I (x) q_i^T
    delta rule            I (x) (I - beta_i k_i k_i^T)      beta_i I (x) k_i     I (x) q_i^T
    Flow-Attention        I                                 w_i I (x) k_i        g_i/I_i I (x) q_i^T
    softmax, slots        I                                 e_i (x) I            a_i (x) I

Source: Sieber et al., 2024, arXiv 2405.15731, section 3, for softmax, linear and normalised attention; the
others are derived from each mixer's own formula. State-space models and gated recurrences are in `ssm.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.attention.dsf.ltv import LTV, refuse_large
from regard.errors import RegardError, ShapeMismatch

Gauge = Literal["read-out", "decay"]


def linear_attention(q: Tensor, k: Tensor, width: int, *, gauge: Gauge = "read-out") -> LTV:
    """Return the system of linear attention, normalised by the sum of its own weights.

    Args:
        q, k: features of queries and keys, [*batch, L, n], not negative; zero where nothing is written.
        width: d, channels of the values.
        gauge: where 1/eta stands: in C, or, as the paper writes it, in Lambda and B.
    """
    _check(q=q, k=k)
    eta = (q * k.cumsum(-2)).sum(-1)
    return normalized_attention(q, k, torch.where(eta > 0, eta, 1.0), width, gauge=gauge)


def normalized_attention(q: Tensor, k: Tensor, eta: Tensor, width: int, *, gauge: Gauge = "read-out") -> LTV:
    """Return the system of y_i = 1/eta_i sum_{j <= i} (q_i . k_j) u_j.

    Args:
        q, k: [*batch, L, n].
        eta: [*batch, L], above 0.
        width: d, channels of the values.
        gauge: as for `linear_attention`.
    """
    _check(q=q, k=k)
    if eta.shape != q.shape[:-1]:
        raise ShapeMismatch(f"eta must be {list(q.shape[:-1])}, and is {list(eta.shape)}.")
    if not bool((eta > 0).all()):
        raise RegardError(f"eta must be above 0 everywhere, and is {float(eta.min()):g} somewhere.")
    if gauge == "read-out":
        return _constant(k, q / eta[..., None], width)
    if gauge != "decay":
        raise RegardError(f"gauge is {gauge!r}; it must be 'read-out' or 'decay'.")
    ratio = torch.cat([torch.zeros_like(eta[..., :1]), eta[..., :-1] / eta[..., 1:]], -1)
    lam = ratio[..., None].expand(*ratio.shape, width * k.shape[-1])
    return LTV(lam, over_channels(k / eta[..., None], width), over_channels(q, width).mT)


def lightning_attention(q: Tensor, k: Tensor, decay: Tensor | float, width: int) -> LTV:
    """Return the system of y_i = sum_{j <= i} decay^{i-j} (q_i . k_j) u_j.

    Args:
        q, k: [*batch, L, n].
        decay: a number, or one a head, broadcastable to [*batch].
        width: d, channels of the values.
    """
    _check(q=q, k=k)
    lam = torch.as_tensor(decay, dtype=q.dtype, device=q.device)
    lam = lam.expand(q.shape[:-2])[..., None, None].expand(*q.shape[:-1], width * q.shape[-1])
    return LTV(lam, over_channels(k, width), over_channels(q, width).mT)


def lightnet(q: Tensor, k: Tensor, width: int) -> LTV:
    """Return the system of LightNet: y_i = sum_{j <= i} (q_i . exp(k_j - z_i)) u_j, z = logcumsumexp(k).

    Args:
        q, k: [*batch, L, n]; k are logits.
        width: d, channels of the values.
    """
    _check(q=q, k=k)
    z = torch.logcumsumexp(k, -2)
    decay = torch.cat([torch.zeros_like(z[..., :1, :]), (z[..., :-1, :] - z[..., 1:, :]).exp()], -2)
    lam = decay[..., None, :].expand(*decay.shape[:-1], width, -1).flatten(-2)
    return LTV(lam, over_channels((k - z).exp(), width), over_channels(q, width).mT)


def delta_rule(q: Tensor, k: Tensor, beta: Tensor, width: int) -> LTV:
    """Return the system of DeltaNet: S_i = S_{i-1} (I - beta_i k_i k_i^T) + beta_i u_i k_i^T, y_i = S_i q_i.

    Args:
        q, k: [*batch, L, n]; keys usually of norm 1.
        beta: [*batch, L].
        width: d, channels of the values.
    """
    _check(q=q, k=k)
    written = beta[..., None] * k
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    lam = matrices_over_channels(eye - written[..., :, None] * k[..., None, :], width)
    return LTV(lam, over_channels(written, width), over_channels(q, width).mT)


def flow_attention(q: Tensor, k: Tensor, write: Tensor, read: Tensor, width: int) -> LTV:
    """Return the system of causal Flow-Attention: y_i = read_i sum_{j <= i} (q_i . k_j) write_j u_j.

    Args:
        q, k: features of queries and keys, [*batch, L, n].
        write: competition w, [*batch, L].
        read: allocation over incoming flow, g / I, [*batch, L].
        width: d, channels of the values.
    """
    _check(q=q, k=k)
    return _constant(write[..., None] * k, read[..., None] * q, width)


def slots(weights: Tensor, width: int) -> LTV:
    """Return the system of any causal mixer with explicit weights: each position is stored in its own slot.

    It is exact, and its state grows with the length: that is the cache of keys and values.

    Args:
        weights: [*batch, L, L], zero above the diagonal.
        width: d, channels of the values.

    Raises:
        RegardError: where a row has weight on a later position.
    """
    length = weights.shape[-1]
    if weights.shape[-2] != length:
        raise ShapeMismatch(f"weights must be [*batch, L, L], and are {list(weights.shape)}.")
    if not bool(torch.isfinite(weights).all()):
        raise RegardError("weights hold a number that is not finite.")
    if bool(weights.triu(1).any()):
        raise RegardError("a row has weight on a later position, so the mixer is not causal.")
    refuse_large("the state of the slot form", *weights.shape[:-2], length, length * width, width)
    wide = torch.eye(width, dtype=weights.dtype, device=weights.device)
    own = torch.eye(length, dtype=weights.dtype, device=weights.device)
    B = torch.einsum("ls,cd->lscd", own, wide).flatten(1, 2)
    C = torch.einsum("...ls,cd->...lcsd", weights, wide).flatten(-2)
    lam = torch.ones_like(C[..., 0, :])
    return LTV(lam, B.expand(*weights.shape[:-2], *B.shape), C)


def taylor_attention(
    q: Tensor, k: Tensor, width: int, *, order: int, scale: float | None = None, gauge: Gauge = "read-out"
) -> LTV:
    """Return the system of softmax attention with exp cut off after the power `order`.

    Args:
        q, k: [*batch, L, n].
        width: d, channels of the values.
        order: highest power kept; the state has 1 + n + ... + n^order entries a channel.
        scale: factor on q k^T; default 1 / sqrt(n).
        gauge: as for `linear_attention`. An odd order may give weights below 0, and then a sum near 0.
    """
    _check(q=q, k=k)
    if isinstance(order, bool) or not isinstance(order, int) or order < 0:
        raise RegardError(f"order is {order!r}; it must be a whole number from 0.")
    refuse_large("Taylor features", *q.shape[:-1], sum(q.shape[-1] ** p for p in range(order + 1)) * width)
    half = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    queries, keys = (_powers(half * x, order) for x in (q, k))
    return linear_attention(queries, keys, width, gauge=gauge)


def _powers(x: Tensor, order: int) -> Tensor:
    """[1, x, x (x) x / sqrt(2!), ...]: an inner product of two is exp of theirs, cut off."""
    powers = [torch.ones_like(x[..., :1])]
    for p in range(1, order + 1):
        powers.append((powers[-1][..., :, None] * x[..., None, :]).flatten(-2) * p**-0.5)
    return torch.cat(powers, -1)


def over_channels(x: Tensor, width: int) -> Tensor:
    """Return I_d (x) x: [*batch, L, n] as columns [*batch, L, d n, d]."""
    refuse_large("a matrix of the system", *x.shape[:-1], x.shape[-1] * width, width)
    eye = torch.eye(width, dtype=x.dtype, device=x.device)
    return torch.einsum("...n,cd->...cnd", x, eye).flatten(-3, -2)


def matrices_over_channels(x: Tensor, width: int) -> Tensor:
    """Return I_d (x) x of matrices: [*batch, L, n, n] as [*batch, L, d n, d n]."""
    refuse_large("Lambda", *x.shape[:-2], x.shape[-2] * width, x.shape[-1] * width)
    eye = torch.eye(width, dtype=x.dtype, device=x.device)
    return torch.einsum("...nm,cd->...cndm", x, eye).flatten(-4, -3).flatten(-2)


def _constant(written: Tensor, read: Tensor, width: int) -> LTV:
    """A system that forgets nothing."""
    B = over_channels(written, width)
    return LTV(torch.ones_like(B[..., 0]), B, over_channels(read, width).mT)


def _check(**given: Tensor) -> None:
    (first, q), (second, k) = given.items()
    if q.ndim < 2 or q.shape != k.shape:
        raise ShapeMismatch(
            f"{first} and {second} must both be [*batch, L, n], and are {list(q.shape)} and {list(k.shape)}."
        )
