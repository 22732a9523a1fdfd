"""A map cut into regions: where tokens stand in memory, and which of them are padding.

An axis of L positions in S regions has a = ceil(L / S) positions a region, and S a - L of padding at its end.
Tokens are laid out region by region, [B, X1.., ...] as [B, R, T, ...] with R = S1 S2.. and T = a1 a2..

Source: Zhu et al., 2023, arXiv 2303.08810, section 3.2. Status: agrees with the official code where S divides
L; its newer form makes regions of floor(L / S) instead, and so more of them than S: give that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import RegardError

Numbers = int | Sequence[int]
MOST_AXES = 3


@dataclass(frozen=True)
class Regions:
    """How a line, plane or volume is cut.

    Attributes:
        lengths: positions along each axis.
        counts: regions along each axis.

    Example:
        >>> plan = Regions((6, 5), (3, 2))
        >>> plan.sizes, plan.count, plan.tokens, plan.split(torch.zeros(1, 6, 5, 4)).shape
        ((2, 3), 6, 6, torch.Size([1, 6, 6, 4]))
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions of a region along each axis."""
        return tuple(-(-n // s) for n, s in zip(self.lengths, self.counts, strict=True))

    @property
    def count(self) -> int:
        """R, the number of regions."""
        return math.prod(self.counts)

    @property
    def tokens(self) -> int:
        """T, the number of positions in a region, padding included."""
        return math.prod(self.sizes)

    @property
    def spare(self) -> tuple[int, ...]:
        """Positions of padding at the end of each axis."""
        whole = zip(self.lengths, self.counts, self.sizes, strict=True)
        return tuple(s * a - n for n, s, a in whole)

    def padded(self, x: Tensor) -> Tensor:
        """Return [B, X1.., ...] with zeros to the end of the last regions."""
        if not any(self.spare):
            return x
        rest = x.ndim - 1 - len(self.lengths)
        return F.pad(x, (0, 0) * rest + tuple(n for spare in self.spare[::-1] for n in (0, spare)))

    def split(self, x: Tensor) -> Tensor:
        """Return [B, X1.., ...] as [B, R, T, ...], zeros or False at padding."""
        rest = tuple(x.shape[1 + len(self.lengths) :])
        cut = [n for pair in zip(self.counts, self.sizes, strict=True) for n in pair]
        x = self.padded(x).reshape(x.shape[0], *cut, *rest)
        return x.permute(self._order(x.ndim)).reshape(x.shape[0], self.count, self.tokens, *rest)

    def joined(self, x: Tensor) -> Tensor:
        """Return [B, R, T, ...] as [B, X1.., ...], without padding."""
        rest = tuple(x.shape[3:])
        x = x.reshape(x.shape[0], *self.counts, *self.sizes, *rest)
        back = sorted(range(x.ndim), key=self._order(x.ndim).__getitem__)
        whole = [s * a for s, a in zip(self.counts, self.sizes, strict=True)]
        x = x.permute(back).reshape(x.shape[0], *whole, *rest)
        return x[(slice(None), *(slice(n) for n in self.lengths))] if any(self.spare) else x

    def real(self, device: Any = None) -> Tensor | None:
        """Return which tokens are no padding, bool [1, R, T], or None where all are."""
        if not any(self.spare):
            return None
        return self.split(torch.ones(1, *self.lengths, dtype=torch.bool, device=device))

    def places(self, device: Any = None) -> Tensor:
        """Return where each position of the map stands among the R T tokens, int64 [X1 X2..]."""
        tokens = torch.arange(self.count * self.tokens, device=device)
        return self.joined(tokens.view(1, self.count, self.tokens)).flatten()

    def _order(self, dims: int) -> list[int]:
        axes = len(self.lengths)
        first = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2)]
        return first + list(range(2 * axes + 1, dims))


def regions_of(lengths: Sequence[int], regions: Numbers, auto_pad: bool = True) -> Regions:
    """Return how a map is cut into regions.

    Args:
        lengths: positions along each axis.
        regions: along each axis; one number for all, or one for each.
        auto_pad: whether axes that are no multiple of their regions are padded.

    Raises:
        RegardError: where there are more regions than positions, or the map would have to be padded and
            must not.
    """
    counts = counts_of(regions, len(lengths))
    for axis, (n, s) in enumerate(zip(lengths, counts, strict=True)):
        if s > n:
            raise RegardError(
                f"regions is {s} along axis {axis}, which has {n} positions; there must be no more regions "
                "than positions."
            )
        if n % s and not auto_pad:
            raise RegardError(
                f"axis {axis} has {n} positions, which {s} regions do not divide; auto_pad=True pads it."
            )
    return Regions(tuple(int(n) for n in lengths), counts)


def counts_of(regions: Any, axes: int) -> tuple[int, ...]:
    """Return the regions along each of `axes` axes.

    Raises:
        RegardError: where they are not one whole number from 1 for each.
    """
    counts = tuple(regions) if isinstance(regions, list | tuple) else (regions,) * axes
    if len(counts) != axes:
        raise RegardError(f"regions is {regions!r}; it must be one number or {axes}, one for each axis.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts):
        raise RegardError(f"regions is {regions!r}; it must be whole numbers from 1.")
    return counts


def check_topk(topk: Any, count: int) -> None:
    """Refuse a number of chosen regions that is none.

    Raises:
        RegardError: where it is not a whole number from 1 to `count`.
    """
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= count:
        raise RegardError(
            f"topk is {topk!r}; it must be a whole number from 1 to {count}, the number of regions."
        )
