"""The scores of small blocks where the decay may be of any strength, by halving.

    scores_ij = sum_c q_ic (a_{j+1} ... a_i)_c k_jc         j <= i, 0 <= a <= 1

A product of shares must not be taken as a quotient of longer ones, which under- and overflow. So blocks of
one position are joined in pairs, those again, and so on. With q_i' aged from the start of its block, and k_j'
aged to the end of its own, the later block of a pair sees the earlier as q_i' . k_j'; afterwards q' of the
later is multiplied by all shares of the earlier, and k' of the earlier by those of the later. Only
products of shares of at most 1 occur, and a is the only exponential. At the end q' and k' are aged over the
whole block, as the state before and after it needs them.

Operations O(T * C * D) for blocks of C, and O(T * D * log C) to age.

Secondary blocks are those of Yang et al., 2023, arXiv 2312.06635, section 4.3; halving is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Halves:
    """Scores of blocks of C positions, a power of two.

    Args:
        q: [X, G, C, D]; ends up aged from the start of the block.
        k: [X, C, D]; ends up aged to its end.
        shares: a, [X, C, D|1].
        scores: [X, G, C, C], filled.
        keep: whether `gradients` will be called.

    Attributes:
        whole: the product of all shares, [X, D|1].
    """

    def __init__(self, q: Tensor, k: Tensor, shares: Tensor, scores: Tensor, keep: bool) -> None:
        self.size = k.shape[-2]
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []
        self._single = (q.clone(), k.clone(), shares) if keep else None
        scores.zero_().diagonal(dim1=-2, dim2=-1).copy_((q * k[:, None]).sum(-1))
        q.mul_(shares[:, None])
        whole = shares
        for size in _sizes(self.size):
            late, early, pairs = _late(q, size), _early(k, size), whole.unflatten(1, (-1, 2))
            below = _below(scores, size)
            below.copy_(_products(late, early).view(below.shape))
            if keep:
                self._levels.append((late.clone(), early.clone(), pairs))
            late.mul_(pairs[:, None, :, 0, None])
            early.mul_(pairs[:, :, 1, None])
            whole = pairs[:, :, 0] * pairs[:, :, 1]
        self.whole = whole[:, 0]

    def gradients(self, scores: Tensor, q: Tensor, k: Tensor) -> None:
        """Turn the gradients of the aged q and k into those of q and k, in place.

        Args:
            scores: the gradient of the scores, [X, G, C, C]; of it only j <= i is read.
            q, k: the gradients of q [X, G, C, D] and k [X, C, D].
        """
        assert self._single is not None
        for size, (late, early, pairs) in zip(
            reversed(_sizes(self.size)), reversed(self._levels), strict=True
        ):
            to_late, to_early, below = _late(q, size), _early(k, size), _below(scores, size)
            to_late.mul_(pairs[:, None, :, 0, None])
            to_early.mul_(pairs[:, :, 1, None])
            rows = below.permute(0, 2, 1, 3, 4).reshape(-1, below.shape[1] * size, size)  # [X n, G s, s]
            queries = late.transpose(1, 2).reshape(rows.shape[0], -1, late.shape[-1])
            more = _bmm(rows, early.reshape(rows.shape[0], size, -1))
            to_late.add_(more.view(late.transpose(1, 2).shape).transpose(1, 2))
            to_early.add_(_bmm(rows.transpose(1, 2), queries).view(early.shape))
        q0, k0, shares = self._single
        same = scores.diagonal(dim1=-2, dim2=-1)[..., None]
        q.mul_(shares[:, None]).addcmul_(same, k0[:, None])
        k.add_((same * q0).sum(1))


def _sizes(size: int) -> list[int]:
    return [1 << i for i in range(size.bit_length() - 1)]


def _late(q: Tensor, size: int) -> Tensor:
    """The later blocks of pairs of [X, G, C, D], as [X, G, n, size, D]."""
    return q.unflatten(2, (-1, 2, size))[:, :, :, 1]


def _early(k: Tensor, size: int) -> Tensor:
    """The earlier blocks of pairs of [X, C, D], as [X, n, size, D]."""
    return k.unflatten(1, (-1, 2, size))[:, :, 0]


def _below(scores: Tensor, size: int) -> Tensor:
    """Where the later blocks see the earlier in [X, G, C, C], a view [X, G, n, size, size]."""
    pairs = scores.unflatten(3, (-1, 2, size)).unflatten(2, (-1, 2, size))[:, :, :, 1, :, :, 0]
    return pairs.diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _products(late: Tensor, early: Tensor) -> Tensor:
    """late . early, [X, G, n, size, size]."""
    x, group, pairs, size, width = late.shape
    if size == 1:
        return (late * early[:, None]).sum(-1)
    rows = late.transpose(1, 2).reshape(x * pairs, group * size, width)
    found = _bmm(rows, early.reshape(x * pairs, size, width).transpose(1, 2))
    return found.view(x, pairs, group, size, size).transpose(1, 2)


def _bmm(one: Tensor, other: Tensor) -> Tensor:
    """Products in the type of the factors, also under autocast."""
    return torch.bmm(one, other, out=one.new_empty(*one.shape[:2], other.shape[2]))
