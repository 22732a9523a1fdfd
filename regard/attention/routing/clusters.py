"""Centroids of each head, learned by online k-means, and the loss that keeps vectors near them.

    nearest(x) = argmax_c x . mu_c                       x normalised, mu [H, C, D]
    N_c <- g N_c + (1 - g) (number of x nearest to c)
    S_c <- g S_c + (1 - g) (sum of x nearest to c)
    N'  = (N + eps) / (sum N + C eps) sum N              eps = 1e-5
    mu_c = S_c / N'_c
    commitment = mean (x - stop(mu_nearest(x)))^2

No gradient moves a centroid. What a forward in training has seen moves them before the next one: they stay
what they were until after the backward pass, so that gradient checkpointing, which runs a forward twice,
chooses alike both times and counts once.

Source: Roy et al., 2020, arXiv 2003.05997, section 4.1 and the official code. Status: partly our choice:
every centroid begins with the weight of one vector, which the first batches outweigh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.select import top_k

EPS, NORM_EPS, ROUNDS = 1e-5, 1e-6, 10
NORMS = ("layernorm", "l2")


def normalized(x: Tensor, norm: str) -> Tensor:
    """Return x [..., D] of norm sqrt(D) around its mean (`layernorm`), or of norm 1 (`l2`).

    In float32 or, from float64, float64.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if norm == "layernorm":
        return F.layer_norm(x.to(wide), x.shape[-1:], eps=NORM_EPS)
    return F.normalize(x.to(wide), dim=-1)


class Clusters(nn.Module):
    """Centroids of some heads.

    Args:
        heads: H.
        count: C, centroids of a head.
        width: D.
        norm: how the vectors are normalised, "layernorm" or "l2"; by "l2" centroids are too.
        decay: g; 1 leaves the centroids where they are.
        start: "noise", or "lloyd": at the vectors that the first forward in training sees, after ten rounds
            of k-means; until then, noise.
        device: of the buffers.

    Attributes:
        centroids: [H, C, D], the mu of above.
        sizes, sums: [H, C] and [H, C, D], N and S.
        started: bool, False while the start is awaited.
    """

    centroids: Tensor
    sizes: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self,
        heads: int,
        count: int,
        width: int,
        *,
        norm: str = "layernorm",
        decay: float = 0.999,
        start: str = "noise",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.decay = norm, decay
        first = normalized(torch.randn(heads, count, width, device=device), norm)
        self.register_buffer("centroids", first)
        self.register_buffer("sizes", torch.ones(heads, count, device=device))
        self.register_buffer("sums", first.clone())
        self.register_buffer("started", torch.tensor(start == "noise", device=device))
        self._seen: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_settle)

    @property
    def count(self) -> int:
        """Number of centroids of a head."""
        return self.centroids.shape[1]

    def affinity(self, x: Tensor) -> Tensor:
        """Return x . mu without gradient, [B, H, C, N], of normalised x [B, H, N, D]."""
        return self.centroids.to(x) @ x.detach().transpose(2, 3)

    def nearest(self, x: Tensor, count: int = 1) -> Tensor:
        """Return the `count` nearest centroids of normalised x [B, H, N, D], int64 [B, H, N, count]."""
        return nearest_of(self.affinity(x), count)

    def commitment(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the mean squared distance of x [B, H, N, D] from its nearest centroids.

        Args:
            valid: bool [B, N], False at padding, which does not count.
        """
        centroids = self.centroids.to(x)
        places = self.nearest(x).expand(-1, -1, -1, x.shape[3])
        near = centroids.expand(len(x), -1, -1, -1).gather(2, places)
        apart = (x - near).square().mean(-1)
        if valid is None:
            return apart.mean()
        counted = valid[:, None].expand_as(apart)
        return (apart * counted).sum() / counted.sum().clamp_min(1)

    @torch.no_grad()
    def observe(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Take note of normalised x [B, H, N, D], for `settle`; valid is bool [B, N], False at padding."""
        if self.decay == 1.0:
            return
        sizes, sums = _tallied(x, self.nearest(x)[..., 0], self.count, valid)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sizes)
            torch.distributed.all_reduce(sums)
        before = self._seen or (0, 0)
        self._seen = sizes + before[0], sums + before[1]

    @torch.no_grad()
    def settle(self) -> None:
        """Move the centroids by what was observed since."""
        if self._seen is None:
            return
        sizes, sums = self._seen
        self._seen, g = None, self.decay
        self.sizes = g * self.sizes.to(sizes) + (1 - g) * sizes
        self.sums = g * self.sums.to(sums) + (1 - g) * sums
        self._move()

    @torch.no_grad()
    def begin(self, x: Tensor, valid: Tensor | None = None, rounds: int = ROUNDS) -> None:
        """Put the centroids where k-means (Lloyd) finds them in normalised x [B, H, N, D].

        It begins at vectors drawn by chance, twice the same only where there are fewer than centroids; a
        centroid that no vector is nearest to stays.

        Args:
            valid: bool [B, N], False at padding.
        """
        heads = x.shape[1]
        flat = x.transpose(0, 1).flatten(1, 2)
        if valid is not None:
            flat = flat[:, valid.flatten()]
        self._seen = None
        self.started = torch.ones_like(self.started)
        found = flat.shape[1]
        if not found:
            return
        drawn = torch.rand(heads, found, device=x.device).argsort(-1)
        drawn = drawn.repeat(1, -(-self.count // found))[:, : self.count]
        self.centroids = flat.gather(1, drawn[..., None].expand(-1, -1, flat.shape[2]))
        for _ in range(rounds):
            sizes, sums = _tallied(flat[None], self.nearest(flat[None])[..., 0], self.count, None)
            empty = sizes == 0
            self.sizes = torch.where(empty, 1.0, sizes)
            self.sums = torch.where(empty[..., None], self.centroids, sums)
            self._move()

    def _move(self) -> None:
        whole = self.sizes.sum(-1, keepdim=True)
        smooth = (self.sizes + EPS) / (whole + self.count * EPS) * whole
        found = self.sums / smooth[..., None]
        self.centroids = normalized(found, self.norm) if self.norm == "l2" else found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast, but never to fewer bits than float32: a running mean would stand still."""
        before = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, x in before.items():
            now = self._buffers[name]
            if now is not None and now.is_floating_point() and now.element_size() < x.element_size() <= 4:
                self._buffers[name] = x.to(now.device)
        return self

    def extra_repr(self) -> str:
        heads, count, width = self.centroids.shape
        return f"heads={heads}, count={count}, width={width}, norm={self.norm}, decay={self.decay}"


def nearest_of(affinity: Tensor, count: int = 1) -> Tensor:
    """Return the `count` centroids of highest affinity [B, H, C, N], int64 [B, H, N, count], best first."""
    return top_k(affinity.transpose(2, 3), min(count, affinity.shape[2]), by_score=True)


def _tallied(x: Tensor, nearest: Tensor, count: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many of x [B, H, N, D] are nearest to each centroid [H, C], and their sums [H, C, D]."""
    chosen = F.one_hot(nearest, count).to(x.dtype)
    if valid is not None:
        chosen = chosen * valid[:, None, :, None]
    return chosen.sum((0, 2)), (chosen.transpose(2, 3) @ x).sum(0)


def _settle(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state is saved: move the centroids."""
    assert isinstance(module, Clusters)
    module.settle()
