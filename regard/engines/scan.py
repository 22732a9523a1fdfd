"""Causal linear recurrences, in chunks.

    S_i = S_{i-1} + k_i v_i^T         [D, Dv]
    out_i = q_i S_i                   [Dv]

Within a chunk of C positions the sum is a masked product of matrices, and between chunks it is the state
S: operations O(T * (C + D) * Dv), memory O(T / C * D * Dv) for the states of all chunks. The chunked form is
that of Hua et al., 2022, arXiv 2202.10447, section 3.3, and Yang et al., 2023, arXiv 2312.06635, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def linear_scan(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return out_i = q_i (S_0 + sum_{j <= i} k_j v_j^T) for every position, and the last state.

    Args:
        q: [B, H, T, D], features of the queries.
        k: [B, Hkv, T, D], features of the keys; zero where a position must write nothing. H is a multiple of
            Hkv, and consecutive query heads share a key head.
        v: [B, Hkv, T, Dv].
        state: S_0, [B, Hkv, D, Dv], or None for zero.
        chunk: positions in a chunk.

    Returns:
        out [B, H, T, Dv] and the state after position T, [B, Hkv, D, Dv]; both float64 where `q` is and
        float32 otherwise.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, length, width = q.shape
    kv_heads, values = k.shape[1], v.shape[3]
    group = heads // kv_heads
    if state is None:
        state = q.new_zeros(batch, kv_heads, width, values, dtype=kind)
    if length == 0:
        return q.new_zeros(batch, heads, 0, values, dtype=kind), state
    chunk = min(chunk, length)
    short = -length % chunk
    count = (length + short) // chunk
    k, v = (_chunks(x.to(kind), short, count, chunk) for x in (k, v))
    q = _chunks(q.to(kind).view(batch, kv_heads, group, length, width), short, count, chunk)
    written = k.transpose(-1, -2) @ v
    states = state[:, :, None] + torch.cat([torch.zeros_like(written[:, :, :1]), written], 2).cumsum(2)
    near = torch.tril(q @ k[:, :, None].transpose(-1, -2)) @ v[:, :, None]
    out = near + q @ states[:, :, None, :-1]
    out = out.reshape(batch, heads, count * chunk, values)[:, :, :length]
    return out, states[:, :, -1]


def _chunks(x: Tensor, short: int, count: int, chunk: int) -> Tensor:
    """Pad the positions of `x` [..., T, D] with `short` zeros and cut them into chunks, [..., N, C, D]."""
    return F.pad(x, (0, 0, 0, short)).unflatten(-2, (count, chunk))
