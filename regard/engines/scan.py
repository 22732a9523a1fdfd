"""Causal linear recurrences, in chunks.

    S_i = diag(a_i) S_{i-1} + k_i v_i^T         [D, Dv]
    out_i = q_i S_i                             [Dv]

with a decay a_i = exp(g_i), g_i <= 0, that is none, one a head, one a head and step, or one a channel and
step. With b_i the sum of g from the start of a chunk of C positions to i, a chunk does

    out_i = sum_{j <= i} (q_i exp(b_i - b_j) . k_j) v_j + (q_i exp(b_i)) S
    S <- diag(exp(b_C)) S + sum_j (k_j exp(b_C - b_j)) v_j^T

`near.py` says how the exponents are taken so that nothing overflows whatever the decay, and `pieces.py` how
chunks follow each other, forward and backward.

Operations O(T * (C + D) * Dv), and 2.5 times as many backward. Beside inputs, outputs and their gradients it
keeps the states before pieces for the gradient, and else O(NUMBERS) of `pieces.py`.
Sources: Hua et al., 2022, arXiv 2202.10447, section 3.3; with decay, Qin et al., 2024, arXiv 2401.04658,
section 3; by channel, Yang et al., 2023, arXiv 2312.06635, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.pieces import Pieces
from regard.engines.scan_triton import scan_triton, uses_triton
from regard.errors import RegardError, ShapeMismatch

CHUNK, LONGEST = 64, 4096
NEVER = -800.0


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out_i = q_i S_i for every position, and the last state.

    States and outputs are float64 where `q` is and float32 otherwise. Products are of bfloat16 where q, k and
    v all are and the machine is made for it: then outputs and what is written are rounded so, but states add
    up in float32. Else products are of the type of the states. Gradients have no gradients of their own.

    Args:
        q: [B, H, T, D], features of the queries.
        k: [B, Hkv, T, D], features of the keys. H is a multiple of Hkv, and consecutive query heads share
            a key head and its state.
        v: [B, Hkv, T, Dv].
        decay: g, at most 0, -inf to forget all: [Hkv], [B, Hkv, T], [B, Hkv, T, D], or None for no decay.
        state: S_0, [B, Hkv, D, Dv], or None for zero.
        valid: bool [B, T]; a position that is False writes nothing and ages nothing.
        starts: bool [B, T]; a position that is True sees nothing of what is before it (packed sequences).
        chunk: positions in a chunk, a power of two; the kernels of Triton choose their own.
        backend: `torch` or `triton`; by default `triton` for several positions on a GPU where it can be used.

    Returns:
        out [B, H, T, Dv] and the state after position T, [B, Hkv, D, Dv].

    Raises:
        ShapeMismatch: where the shapes do not fit.
        RegardError: for a decay above 0, a chunk that is no power of two, or a backend that is unknown or
            cannot take the inputs.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 1)
        >>> out, state = scan(q, k, v, torch.tensor([0.5]).log())
        >>> out.flatten().tolist(), state.item()
        ([1.0, 1.5, 1.75], 1.75)
    """
    _check(q, k, v, decay, state, valid, starts, chunk)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    if state is None:
        state = q.new_zeros(batch, kv_heads, width, v.shape[3], dtype=wide)
    state = state.to(wide)
    if q.shape[0] * heads * length == 0:
        return q.new_zeros(batch, heads, length, v.shape[3], dtype=wide), state
    if valid is not None:
        k = k * valid[:, None, :, None]
    if (backend is not None or length > 1) and uses_triton(backend, q, k, v):
        return scan_triton(q, k, v, _exponents(decay, valid, None), state, starts)
    decay = _exponents(decay, valid, starts)
    q = q.unflatten(1, (kv_heads, heads // kv_heads))
    if length == 1:
        out, state = _one(q.to(wide), k.to(wide), v.to(wide), decay, state)
    else:
        out, state = _Scan.apply(q, k, v, decay, state, chunk)
    return out.flatten(1, 2), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None,
    starts: Tensor | None, chunk: int,
) -> None:  # fmt: skip
    batch, heads, length, width = q.shape
    kv_heads, values = k.shape[1], v.shape[3]
    wanted: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("k", k, [(batch, kv_heads, length, width)]),
        ("v", v, [(batch, kv_heads, length, values)]),
        ("decay", decay, [(kv_heads,), (batch, kv_heads, length), (batch, kv_heads, length, width)]),
        ("state", state, [(batch, kv_heads, width, values)]),
        ("valid", valid, [(batch, length)]),
        ("starts", starts, [(batch, length)]),
    ]
    for name, x, shapes in wanted:
        if x is not None and tuple(x.shape) not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise ShapeMismatch(f"{name} is {list(x.shape)}; with q {list(q.shape)} it must be {allowed}.")
    if heads % kv_heads:
        raise ShapeMismatch(f"q has {heads} heads, which is no multiple of the {kv_heads} of k.")
    if chunk < 1 or chunk > LONGEST or chunk & (chunk - 1):
        raise RegardError(f"chunk is {chunk}; it must be a power of two, at most {LONGEST}.")
    if decay is not None and bool((decay > 0).any()):
        raise RegardError(
            "decay is above 0 somewhere, so that states would grow; it is the logarithm of a share."
        )


def _exponents(decay: Tensor | None, valid: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """The decay, [Hkv] or [B|1, Hkv|1, T, D|1]; 0 at padding, NEVER where nothing from before is seen."""
    if decay is not None:
        decay = decay.clamp(min=NEVER)
        if decay.ndim == 3:
            decay = decay[..., None]
    if valid is not None and decay is not None:
        by_step = decay.view(1, -1, 1, 1) if decay.ndim == 1 else decay
        decay = by_step * valid[:, None, :, None]
    if starts is not None:
        if decay is None:
            decay = torch.zeros(1, device=starts.device)
        by_step = decay.view(1, -1, 1, 1) if decay.ndim == 1 else decay
        decay = torch.where(starts[:, None, :, None], NEVER, by_step)
    return decay


def _one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for one position."""
    if decay is not None:
        by_step = decay.view(1, -1, 1, 1) if decay.ndim == 1 else decay
        state = state * by_step.exp().to(state.dtype).transpose(2, 3)
    state = state + k.transpose(2, 3) * v
    return q @ state[:, :, None], state


class _Scan(torch.autograd.Function):
    """`Pieces` with its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad)
        out, last, before = Pieces(q, k, v, decay, chunk, _kind(q, k, v)).forward(state, keep)
        ctx.chunk = chunk
        if keep:
            ctx.save_for_backward(q, k, v, decay, before, last)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, before, last = ctx.saved_tensors
        pieces = Pieces(q, k, v, decay, ctx.chunk, _kind(q, k, v))
        to_q, to_k, to_v, to_state = pieces.backward(grad_out, before, grad_last)
        to_decay = None
        if ctx.needs_input_grad[3]:
            to_decay = gradient_of_decay(q, k, to_q, to_k, last, grad_last, decay)
        return to_q, to_k, to_v, to_decay, to_state, None


def gradient_of_decay(
    q: Tensor, k: Tensor, to_q: Tensor, to_k: Tensor, last: Tensor, to_last: Tensor, decay: Tensor
) -> Tensor:
    """The gradient of g, from those of q and k.

    g_t weighs every pair that it stands between: it ages q_i for i >= t and, with the opposite sign, k_j for
    j >= t, and the last state. So it is the sum of q_i dq_i - k_i dk_i over i >= t, and of S dS.
    """
    wide = last.dtype
    each = (q.to(wide) * to_q).sum(2) - k.to(wide) * to_k  # [B, H, T, D]
    end = (last * to_last).sum(-1)[:, :, None]  # [B, H, 1, D]
    if decay.shape[-1] != k.shape[-1] or decay.ndim == 1:
        each, end = (x.sum(-1, keepdim=True, dtype=torch.float64) for x in (each, end))
    found = each.flip(2).cumsum(2).flip(2) + end
    if decay.ndim == 1:
        return found.sum((0, 2, 3)).to(decay.dtype)
    return found.sum_to_size(decay.shape).to(decay.dtype)


def _kind(*given: Tensor) -> torch.dtype:
    """The type of products: float64, or bfloat16 where all are and it is fast here, else float32."""
    if given[0].dtype == torch.float64:
        return torch.float64
    fast = given[0].is_cuda or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and all(x.dtype == torch.bfloat16 for x in given) else torch.float32
