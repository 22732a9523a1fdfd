"""Lightning Attention-2: tiles from left to right, and their gradients written by hand.

For tile positions r, c < C, with b_r the sum of the logarithmic decays from the tile's start to r:

    D[r, c] = exp(b_r - b_c) for r >= c, else 0
    a_r = exp(b_r)   w_c = exp(b_C - b_c)   g = exp(b_C)
    O = (Q K^T * D) V + a (Q S)                      S <- g S + (w K)^T V

    P = (dO V^T) * D                                 R the gradient of the state that leaves the tile
    dQ = P K + a (dO S^T)                            first sweep, which makes the S again
    dK = P^T Q + w (V R^T)                           second sweep, from right to left
    dV = (Q K^T * D)^T dO + w (K R)                  R <- g R + (a Q)^T dO

Beside inputs and outputs, memory is one tile and one state, forwards and backwards. With a constant decay
b_r = -s (r + 1): then this is Qin et al., 2024, arXiv 2401.04658, algorithms 1 and 2, where S is the state
itself; the official kernel stores exp(-s) S. Status: agrees with the official code's outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast lowers nothing; sums over a text need float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def by_tiles(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Return o_i = q_i S_i with S_i = exp(decay_i) S_{i-1} + k_i v_i^T, and the last S.

    Args:
        q, k: [B, H, T, D], float32 or float64.
        v: [B, H, T, Dv].
        decay: float64 [B|1, H, T], at most 0; no gradient goes to it.
        state: [B, H, D, Dv].
        size: C, positions in a tile, from 1.

    Returns:
        o [B, H, T, Dv] and the state [B, H, D, Dv].
    """
    out, last = _Tiles.apply(q, k, v, decay, state, size)
    return out, last


class _Tile(NamedTuple):
    """Where a tile lies, and how much of what is left where in it."""

    at: slice
    inside: Tensor  # D [B|1, H, C, C]
    since_start: Tensor  # a [B|1, H, C, 1]
    to_end: Tensor  # w [B|1, H, C, 1]
    whole: Tensor  # g [B|1, H, 1, 1]


def _tiles(decay: Tensor, size: int, dtype: torch.dtype, backwards: bool = False) -> Iterator[_Tile]:
    length = decay.shape[2]
    starts = range(0, length, size)
    for start in reversed(starts) if backwards else starts:
        at = slice(start, min(start + size, length))
        sums = decay[:, :, at].cumsum(-1)[..., None]
        later = torch.ones(sums.shape[2], sums.shape[2], dtype=torch.bool, device=sums.device).tril()
        apart = (sums - sums.transpose(-1, -2)).masked_fill(~later, -torch.inf)
        end = sums[:, :, -1:]
        parts = (apart, sums, end - sums, end)
        yield _Tile(at, *(x.exp().to(dtype) for x in parts))


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, decay, state)
        ctx.size = size
        out = v.new_empty(*q.shape[:3], v.shape[3])
        for tile in _tiles(decay, size, q.dtype):
            q_, k_, v_ = (x[:, :, tile.at] for x in (q, k, v))
            near = (q_ @ k_.mT * tile.inside) @ v_
            out[:, :, tile.at] = near + tile.since_start * (q_ @ state)
            state = _next(state, k_, v_, tile)
        return out, state.clone() if q.shape[2] == 0 else state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grads[0].device):
            return _gradients(ctx.saved_tensors, ctx.size, *grads)


def _gradients(
    saved: tuple[Tensor, ...], size: int, grad: Tensor, leaving: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, decay, state = saved
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for tile in _tiles(decay, size, q.dtype):
        at, k_, v_ = tile.at, k[:, :, tile.at], v[:, :, tile.at]
        g_ = grad[:, :, at]
        dq[:, :, at] = (g_ @ v_.mT * tile.inside) @ k_ + tile.since_start * (g_ @ state.mT)
        state = _next(state, k_, v_, tile)
    for tile in _tiles(decay, size, q.dtype, backwards=True):
        at = tile.at
        q_, k_, v_, g_ = (x[:, :, at] for x in (q, k, v, grad))
        dk[:, :, at] = (g_ @ v_.mT * tile.inside).mT @ q_ + tile.to_end * (v_ @ leaving.mT)
        dv[:, :, at] = (q_ @ k_.mT * tile.inside).mT @ g_ + tile.to_end * (k_ @ leaving)
        leaving = tile.whole * leaving + (tile.since_start * q_).mT @ g_
    return dq, dk, dv, None, leaving, None


def _next(state: Tensor, k: Tensor, v: Tensor, tile: _Tile) -> Tensor:
    return tile.whole * state + (tile.to_end * k).mT @ v
