"""Flows of a causal flow network, in chunks: sums of products of all positions up to each one.

    I_i = <q_i, sum_{j <= i} k_j>                 what flows into target i
    O_i = <k_i, sum_{j <= i} q_j>                 what flows out of source i
    A_i = <q_i, sum_{j <= i} k_j n_j / O_j> / n_i       arriving at i, where every source gives 1
    L_i = <k_i, sum_{j <= i} q_j n_j / I_j> / n_i       leaving i, where every target takes 1

with n_i the number of valid positions up to i and <a, b> = sum_d (a_d + eps) (b_d + eps). All four come from
the products of the pairs of a chunk, taken once, and from sums over what is before it.

Operations O(T * C * D), memory O(T * C).
Source: Wu et al., 2022, arXiv 2202.06258, section 3.2, with the sums and the eps of its causal code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True, eq=False)
class Flows:
    """What `causal_flows` returns, [B, H, T] each, and the sums that it goes on from, [B, H, 4, D]."""

    incoming: Tensor
    arriving: Tensor
    leaving: Tensor
    sums: Tensor


def causal_flows(q: Tensor, k: Tensor, count: Tensor, sums: Tensor | None = None, *, eps: float) -> Flows:
    """Return the flows at every position.

    Args:
        q, k: features, not negative, zero at padding, [B, H, T, D].
        count: n, at least 1, in the dtype of q, [B, T].
        sums: what this returned for the positions before; None at the beginning.
        eps: as above.

    Example:
        >>> q = k = torch.ones(1, 1, 3, 2)
        >>> flows = causal_flows(q, k, torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
        >>> flows.incoming.flatten().tolist(), flows.leaving.flatten().tolist()
        ([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])
    """
    batch, heads, length, width = q.shape
    if sums is None:
        sums = q.new_zeros(batch, heads, 4, width)
    if length == 0:
        none = q.new_zeros(batch, heads, 0)
        return Flows(none, none, none, sums)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    q, k, count = (_chunks(x, size) for x in (q, k, count[:, None, :, None]))
    count = count[..., 0].clamp(min=1)
    products = q @ k.transpose(-1, -2)
    before = torch.ones(size, size, dtype=q.dtype, device=q.device).tril()
    low, high = products * before, (products * before.T).transpose(-1, -2)
    queries, keys = (_Side(x, x.sum(-1), eps) for x in (q, k))
    one = torch.ones_like(keys.sizes)
    starts = sums.unbind(2)
    incoming, k_sum = queries.flow(low.sum(-1), keys, one, starts[0])
    outgoing, q_sum = keys.flow(high.sum(-1), queries, one, starts[1])
    given, taken = count / outgoing, count / incoming
    arriving, k_given = queries.flow(_times(low, given), keys, given, starts[2])
    leaving, q_taken = keys.flow(_times(high, taken), queries, taken, starts[3])
    incoming, arriving, leaving = (
        x.flatten(2)[..., :length] for x in (incoming, arriving / count, leaving / count)
    )
    return Flows(incoming, arriving, leaving, torch.stack([k_sum, q_sum, k_given, q_taken], 2))


def _chunks(x: Tensor, size: int) -> Tensor:
    """Pad the positions of `x` [..., T, D] with zeros and cut them into chunks, [..., N, C, D]."""
    short = -x.shape[-2] % size
    return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, size))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector; a CPU multiplies a row by a matrix four times faster than a matrix by a column."""
    return (vector[..., None, :] @ matrix.transpose(-1, -2))[..., 0, :]


@dataclass(frozen=True, eq=False)
class _Side:
    """The features of one side, [B, H, N, C, D], and their sums over D, [B, H, N, C]."""

    x: Tensor
    sizes: Tensor
    eps: float

    def flow(self, near: Tensor, other: _Side, share: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return <x_i, sum_{j <= i} share_j other_j> and the whole sum, [B, H, D].

        Args:
            near: what comes from the chunk itself, without eps, [B, H, N, C].
            start: the sum over what is before all chunks, [B, H, D].
        """
        totals = (share[..., None, :] @ other.x)[..., 0, :]
        before = torch.cat([start[:, :, None], start[:, :, None] + totals.cumsum(2)], 2)
        last, before = before[:, :, -1], before[:, :, :-1]
        sizes = (other.sizes * share).cumsum(-1) + before.sum(-1, keepdim=True)
        far = _times(self.x, before)
        return near + far + self.eps * (sizes + self.sizes) + self.x.shape[-1] * self.eps**2, last
