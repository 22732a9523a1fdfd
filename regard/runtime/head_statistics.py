"""Comparisons of scores and of sets: rank correlation, overlap against chance, AUC."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Overlap:
    """How far two sets coincide, beside what chance gives.

    Attributes:
        shared: members of both.
        first, second: sizes of the sets.
        population: of how many both were drawn.
        expected: members that two random sets of these sizes share on average.
        p_value: probability that two random sets share at least `shared`, exact.
    """

    shared: int
    first: int
    second: int
    population: int

    @property
    def fraction(self) -> float:
        """Shared members as a fraction of the smaller set."""
        return self.shared / min(self.first, self.second)

    @property
    def jaccard(self) -> float:
        """Shared members as a fraction of the union."""
        return self.shared / (self.first + self.second - self.shared)

    @property
    def expected(self) -> float:
        return self.first * self.second / self.population

    @property
    def p_value(self) -> float:
        ways = math.comb(self.population, self.second)
        most = min(self.first, self.second)
        hits = sum(
            math.comb(self.first, n) * math.comb(self.population - self.first, self.second - n)
            for n in range(self.shared, most + 1)
        )
        return hits / ways

    def __str__(self) -> str:
        return (
            f"{self.shared} shared of {self.first} and {self.second} among {self.population} "
            f"(chance {self.expected:.1f}, p = {self.p_value:.2g})"
        )


def overlap(first: Collection[Hashable], second: Collection[Hashable], population: int) -> Overlap:
    """Compare two sets drawn from `population` things.

    Raises:
        RegardError: where a set is empty, or the sets hold more than the population.
    """
    one, two = set(first), set(second)
    if not one or not two or len(one | two) > population:
        raise RegardError(
            f"an overlap needs two filled sets of at most {population} things together; "
            f"these hold {len(one)} and {len(two)}."
        )
    return Overlap(len(one & two), len(one), len(two), population)


def ranks(values: Values) -> Values:
    """Rank from 1; equal values share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def rank_correlation(first: Values, second: Values) -> float:
    """Return Spearman's rank correlation; NaN where either is constant."""
    one, two = (ranks(v) - (len(v) + 1) / 2 for v in (first, second))
    scale = math.sqrt(float(one @ one) * float(two @ two))
    return float(one @ two) / scale if scale else math.nan


def auc(inside: Values, outside: Values) -> float:
    """Return the probability that an inside value exceeds an outside one; ties count half.

    It is Mann and Whitney's U over its largest possible value.
    """
    rank = ranks(np.concatenate([inside, outside]))[: len(inside)].sum()
    return float(rank - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside))
