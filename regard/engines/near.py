"""What the positions of a chunk get from each other, and how they meet the states before and after it.

With b_i the sum of the exponents g from the start of a chunk to i, the scores of a chunk are

    scores_ij = sum_c q_ic exp(b_ic - b_jc) k_jc        j <= i

in one of three ways:

- `Factored`: (q_i exp(b_i)) . (k_j exp(-b_j)), the cheapest. exp(-b_j) overflows in general, so it is taken
  only where no channel of any of the chunks decays by more than REACH altogether, which the sums tell.
- `Weighted`: (q_i . k_j) exp(b_i - b_j), of any strength, for a decay that is the same for all channels.
- `Halved`: of any strength, by channel; see `halves.py`.

Shapes: N chunks of C positions, B batch rows, H key heads, G query heads to a key head, X = N B H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.engines.halves import Halves

REACH = 40.0


class Near:
    """The scores of some chunks, and their queries and keys as the states need them.

    Attributes:
        q: [X, G C, D], as they see the state before the chunk.
        k: [X, C, D], as what they write stands in the state after it, but for `late`.
        scores: [X, G C, C], 0 above the diagonal of each head.
        kept: what is left of the state before, [N|1, B|1, H|1, D|1, 1], or None for all of it.
        late: whether what is written is to be multiplied by `kept`, as the state before is.
    """

    q: Tensor
    k: Tensor
    scores: Tensor
    kept: Tensor | None
    late: bool

    def gradients(self, scores: Tensor, q: Tensor, k: Tensor, into_q: Tensor, into_k: Tensor) -> None:
        """Write the gradients of the queries and keys that were given.

        Args:
            scores, q, k: gradients of the attributes, which are used up.
            into_q: [N, B, H, G, C, D], where to write that of the queries.
            into_k: [N, B, H, C, D].
        """
        raise NotImplementedError


class Factored(Near):
    """Scores as products of scaled queries and keys.

    Args:
        q: [N, B, H, G, C, D], as given; k: [N, B, H, C, D].
        factors: exp(b) and exp(-b), [N|1, B|1, H|1, C, D|1], or None without decay.
        room: where to put q, k and scores, contiguous.
    """

    late = True

    def __init__(
        self, q: Tensor, k: Tensor, factors: tuple[Tensor, Tensor] | None, room: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        to_q, to_k, scores = room
        self.factors, self.kept = factors, None
        if factors is None:
            to_q.copy_(q)
            to_k.copy_(k)
        else:
            fall, rise = factors
            self.kept = fall[..., -1, :, None]
            torch.mul(q, fall[:, :, :, None], out=to_q)
            torch.mul(k, rise, out=to_k)
        self.q, self.k = to_q.flatten(3, 4).flatten(0, 2), to_k.flatten(0, 2)
        self.scores = scores
        torch.bmm(self.q, self.k.transpose(1, 2), out=scores)
        _by_head(scores).tril_()

    def gradients(self, scores: Tensor, q: Tensor, k: Tensor, into_q: Tensor, into_k: Tensor) -> None:
        _by_head(scores).tril_()
        q.baddbmm_(scores, self.k)
        k.baddbmm_(scores.transpose(1, 2), self.q)
        if self.factors is None:
            into_q.copy_(q.view(into_q.shape))
            into_k.copy_(k.view(into_k.shape))
        else:
            fall, rise = self.factors
            torch.mul(q.view(into_q.shape), fall[:, :, :, None], out=into_q)
            torch.mul(k.view(into_k.shape), rise, out=into_k)


class Weighted(Near):
    """Scores as products of queries and keys, times what is left; `sums` are b, [.., C, 1]."""

    late = False

    def __init__(self, q: Tensor, k: Tensor, sums: Tensor, room: tuple[Tensor, Tensor, Tensor]) -> None:
        to_q, to_k, self.scores = room
        to_q.copy_(q)
        to_k.copy_(k)
        self._q, self._k = to_q.flatten(3, 4).flatten(0, 2), to_k.flatten(0, 2)
        wide = _wide(q)
        self.fall, self.rest = sums.exp().to(wide), (sums[..., -1:, :] - sums).exp().to(wide)
        self.kept = self.fall[..., -1, :, None]
        before = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).tril()
        apart = (sums - sums.transpose(-1, -2)).masked_fill(~before, -torch.inf)
        self.left = apart.exp().to(to_q.dtype)[:, :, :, None]  # [N|1, B|1, H|1, 1, C, C]
        torch.bmm(self._q, self._k.transpose(1, 2), out=self.scores)
        self._weigh(self.scores, to_q.shape)
        self.q = (to_q * self.fall[:, :, :, None]).to(to_q.dtype).flatten(3, 4).flatten(0, 2)
        self.k = (to_k * self.rest).to(to_k.dtype).flatten(0, 2)

    def _weigh(self, scores: Tensor, shape: torch.Size) -> None:
        scores.view(*shape[:-1], -1).mul_(self.left)

    def gradients(self, scores: Tensor, q: Tensor, k: Tensor, into_q: Tensor, into_k: Tensor) -> None:
        self._weigh(scores, into_q.shape)
        q.view(into_q.shape).mul_(self.fall[:, :, :, None])
        k.view(into_k.shape).mul_(self.rest)
        into_q.copy_(q.baddbmm_(scores, self._k).view(into_q.shape))
        into_k.copy_(k.baddbmm_(scores.transpose(1, 2), self._q).view(into_k.shape))


class Halved(Near):
    """Scores by halving, with decay by channel; `exponents` [N, B, H, C, D] are not summed yet."""

    late = False

    def __init__(
        self, q: Tensor, k: Tensor, exponents: Tensor, room: tuple[Tensor, Tensor, Tensor], keep: bool
    ) -> None:
        kind, wide = room[0].dtype, _wide(q)
        to_q, to_k, scores = (x if kind == wide else x.to(wide) for x in room)
        to_q.copy_(q)
        to_k.copy_(k)
        shares = exponents.to(wide).exp().expand(to_k.shape).reshape(-1, *to_k.shape[3:])
        by_head = to_q.flatten(0, 2)
        self.halves = Halves(by_head, to_k.flatten(0, 2), shares, _by_head(scores), keep)
        self.q, self.k = by_head.flatten(1, 2).to(kind), to_k.flatten(0, 2).to(kind)
        self.scores = scores.to(kind)
        self.kept = exponents.sum(-2).exp().to(wide)[..., None]

    def gradients(self, scores: Tensor, q: Tensor, k: Tensor, into_q: Tensor, into_k: Tensor) -> None:
        scores, q, k = (x.to(_wide(x)) for x in (scores, q, k))
        by_head = q.view(-1, *into_q.shape[3:])
        self.halves.gradients(_by_head(scores), by_head, k)
        into_q.copy_(by_head.view(into_q.shape))
        into_k.copy_(k.view(into_k.shape))


def factors_of(sums: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(b) and exp(-b), for `Factored`."""
    return sums.exp().to(wide), (-sums).exp().to(wide)


def _wide(x: Tensor) -> torch.dtype:
    """The type of factors of `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_head(scores: Tensor) -> Tensor:
    """[X, G C, C] as [X, G, C, C]."""
    return scores.unflatten(1, (-1, scores.shape[-1]))
