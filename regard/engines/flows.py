"""Flows of a causal flow network, in chunks: sums of products of all positions up to each one.

    I_i = <q_i, sum_{j <= i} k_j>                 what flows into target i
    O_i = <k_i, sum_{j <= i} q_j>                 what flows out of source i
    A_i = <q_i, sum_{j <= i} k_j n_j / O_j> / n_i       arriving at i, where every source gives 1
    L_i = <k_i, sum_{j <= i} q_j n_j / I_j> / n_i       leaving i, where every target takes 1

with n_i the number of valid positions up to i and <a, b> = sum_d (a_d + eps) (b_d + eps). All four come from
the products of the pairs of a chunk, taken once, and from sums over what is before it. Queries and keys do
the same with parts exchanged, so both are computed at once, in tensors with a first dimension of 2.

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
        eps: as above, more than 0.

    Example:
        >>> q = k = torch.ones(1, 1, 3, 2)
        >>> flows = causal_flows(q, k, torch.tensor([[1.0, 2.0, 3.0]]), eps=1e-9)
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
    both = _Both.of(_chunks(torch.stack([q, k]), size), eps)
    starts = sums.unflatten(2, (2, 2)).movedim((2, 3), (0, 1))
    count = _chunks(count[:, None, :, None], size)[..., 0].clamp(min=1)
    (incoming, outgoing), plain = both.flow(torch.ones_like(both.sizes), starts[0])
    share = count / torch.stack([incoming, outgoing])
    (arriving, leaving), shared = both.flow(share, starts[1])
    incoming, arriving, leaving = (
        x.flatten(2)[..., :length] for x in (incoming, arriving / count, leaving / count)
    )
    last = torch.stack([plain, shared]).movedim((0, 1), (2, 3)).flatten(2, 3)
    return Flows(incoming, arriving, leaving, last)


def _chunks(x: Tensor, size: int) -> Tensor:
    """Pad the positions of `x` [..., T, D] with zeros and cut them into chunks, [..., N, C, D]."""
    short = -x.shape[-2] % size
    return (F.pad(x, (0, 0, 0, short)) if short else x).unflatten(-2, (-1, size))


def _row_times(row: Tensor, matrix: Tensor) -> Tensor:
    """row^T matrix; a CPU does it four times faster than a matrix times a column."""
    return (row[..., None, :] @ matrix)[..., 0, :]


@dataclass(frozen=True, eq=False)
class _Both:
    """Queries and keys in chunks.

    Attributes:
        x: the features, [2, B, H, N, C, D].
        sizes: their sums over D, [2, B, H, N, C].
        low: products of each query with the keys up to it, [B, H, N, C, C], and `high`: of each key with the
            queries up to it, a column a key.
        constant: eps, and what it adds by itself.
    """

    x: Tensor
    sizes: Tensor
    low: Tensor
    high: Tensor
    constant: tuple[float, float]

    @classmethod
    def of(cls, x: Tensor, eps: float) -> _Both:
        products = x[0] @ x[1].transpose(-1, -2)
        before = torch.ones(products.shape[-2:], dtype=x.dtype, device=x.device).tril()
        return cls(x, x.sum(-1), products * before, products * before.T, (eps, x.shape[-1] * eps**2))

    def flow(self, share: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return <x_i, sum_{j <= i} share_j y_j> with y the other side, and the whole sums of each side.

        Args:
            share: of each position in the sum of its side, [2, B, H, N, C].
            start: the sums over what is before all chunks, [2, B, H, D].

        Returns:
            [2, B, H, N, C] and [2, B, H, D].
        """
        eps, constant = self.constant
        sums = torch.cat([start[:, :, :, None], _row_times(share, self.x)], 3).cumsum(3)
        before, last = sums[:, :, :, :-1].flip(0), sums[:, :, :, -1]
        near = torch.stack(
            [_row_times(share[1], self.low.transpose(-1, -2)), _row_times(share[0], self.high)]
        )
        far = _row_times(before, self.x.transpose(-1, -2))
        written = (self.sizes * share).cumsum(-1).flip(0) + before.sum(-1, keepdim=True)
        return near + far + (written + self.sizes) * eps + constant, last
