"""Memories of one matrix, in blocks of any number of chunks: a triangular system gives every gradient.

The residual of position i, taken at the start s(i) of its chunk, is R_i = 2 (k_i M_{s(i)} - v_i), and the
memory there holds earlier residuals of the same block. With G, beta and f as in `chunk.py`, and rows of them
taken at s(i) marked by a stroke,

    (I + 2 (K K^T * G')) R = 2 (beta' * K) M + 2 (f' * K) S - 2 V

is unit lower triangular, so that chunks of one position, the exact recurrence, cost what large ones do. With
Z = [M; S] a block does Z <- F Z + E, and all but this is computed for all blocks at once. Without momentum,
after Yang et al., 2024, arXiv 2406.06484, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.memory.chunk import Shares


def linear_blocks(
    q: Tensor, k: Tensor, v: Tensor, shares: Shares, memory: Tensor, surprise: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of whole blocks, and [M; S] before each block and after the last.

    Args:
        q, k: [B, H, N, C, n], N blocks of C positions.
        v: [B, H, N, C, d].
        memory, surprise: [B, H, n, d]; no surprise without momentum.
        chunk: positions between two gradient points; it divides C, or C is less.

    Returns:
        out [B, H, N, C, d], the states [B, H, N, n or 2 n, d], and the last state [B, H, n or 2 n, d].
    """
    read, stored, solved, values = _of_blocks(q, k, v, shares, chunk)
    step = -stored.mT @ solved + _decay(shares, k.shape[-1])
    added = stored.mT @ values
    state = memory if surprise is None else torch.cat([memory, surprise], -2)
    states = []
    for factor, add in zip(step.unbind(2), added.unbind(2), strict=True):
        states.append(state)
        state = add + factor @ state
    before = torch.stack(states, 2)
    residual = solved @ before - values
    out = read @ before - ((q @ k.mT) * shares.written) @ residual
    return out, before, state


def _of_blocks(
    q: Tensor, k: Tensor, v: Tensor, shares: Shares, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys as they meet [M; S], and what makes R = solved Z - values."""
    size = k.shape[-2]
    starts = torch.arange(size, device=k.device) // chunk * chunk
    kept = F.pad(shares.kept, (0, 0, 1, 0), value=1.0)[..., starts, :]
    read, asked = [shares.kept * q], [2 * kept * k]
    stored = [k * shares.written[..., -1, :, None]]
    if shares.moved is not None:
        moved = F.pad(shares.moved, (0, 0, 1, 0))[..., starts, :]
        read, asked = [*read, shares.moved * q], [*asked, 2 * moved * k]
        stored = [*stored, k * shares.surprised[..., -1, :, None]]
    right = torch.cat([*asked, 2 * v], -1)
    if chunk < size:
        seen = F.pad(shares.written, (0, 0, 1, 0))[..., starts, :]
        system = 2 * (k @ k.mT) * seen
        right = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    solved, values = right.split([right.shape[-1] - v.shape[-1], v.shape[-1]], -1)
    return torch.cat(read, -1), torch.cat(stored, -1), solved, values


def _decay(shares: Shares, width: int) -> Tensor:
    """The part of F that does not depend on keys, [[beta, f], [0, m]] of the last position."""
    eye = torch.eye(width, dtype=shares.kept.dtype, device=shares.kept.device)
    top = shares.kept[..., -1:, :] * eye
    if shares.moved is None or shares.carried is None:
        return top
    upper = torch.cat([top, shares.moved[..., -1:, :] * eye], -1)
    lower = shares.carried * eye
    return torch.cat([upper, torch.cat([torch.zeros_like(lower), lower], -1)], -2)
