"""What the positions of a block get from each other, where each channel decays at a rate of its own.

    out_i = sum_{j <= i} (q_i exp(b_i - b_j) . k_j) v_j         b_i [D], falling with i

exp(b_i - b_j) does not factor safely: exp(-b_j) overflows. So a block is cut into halves: the later positions
see the earlier ones through the sum r at the middle, as (q_i exp(b_i - r)) . (k_j exp(r - b_j)), in which no
exponent is positive, and each half is cut again, down to blocks of LEAF positions that are taken channel by
channel. Operations O(T * C * (D + Dv)) for blocks of C, and O(T * (LEAF + log C) * D) exponentials.

Secondary blocks are those of Yang et al., 2023, arXiv 2312.06635, section 4.3; halving is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 4


def same(one: Tensor, other: Tensor) -> Tensor:
    """Whether positions [..., I] and [..., J] are of one sequence, bool [..., I, J]."""
    return one[..., :, None] == other[..., None, :]


def within_blocks(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, sequence: Tensor | None) -> Tensor:
    """What each position of a block gets from the block, where the decay differs by channel.

    Args:
        q, k, v, sums: [B, Hkv, G|1, N, C, .].
        sequence: [B, 1, 1, N, C] or None.
    """
    blocks, size = k.shape[3], k.shape[4]
    if size <= LEAF:
        return _leaf(q, k, sums, sequence) @ v
    q, k, v, sums = (x.unflatten(-2, (2, size // 2)) for x in (q, k, v, sums))
    halves = None if sequence is None else sequence.unflatten(-1, (2, size // 2))
    out = within_blocks(
        q.flatten(3, 4), k.flatten(3, 4), v.flatten(3, 4), sums.flatten(3, 4),
        None if halves is None else halves.flatten(3, 4),
    ).unflatten(3, (blocks, 2))  # fmt: skip
    early, late = sums.unbind(-3)
    middle = early[..., -1:, :]
    queries = q[..., 1, :, :] * (late - middle).to(q.dtype).exp()
    keys = k[..., 0, :, :] * (middle - early).to(k.dtype).exp()
    scores = queries @ keys.transpose(-1, -2)
    if halves is not None:
        scores = scores * same(halves[..., 1, :], halves[..., 0, :])
    second = out[..., 1, :, :] + scores @ v[..., 0, :, :]
    return torch.stack([out[..., 0, :, :], second], -3).flatten(-3, -2)


def _leaf(q: Tensor, k: Tensor, sums: Tensor, sequence: Tensor | None) -> Tensor:
    """The scores of a small block, channel by channel, [..., C, C]."""
    before = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).tril()
    if sequence is not None:
        before = before & same(sequence, sequence)
    apart = sums[..., :, None, :] - sums[..., None, :, :]
    left = apart.masked_fill(~before[..., None], -torch.inf).to(k.dtype).exp()
    return ((left * k[..., None, :, :]) @ q[..., None]).squeeze(-1)
