"""Random sets of experts that fire as much as a given set, to hold its effect against.

    rate(S) = sum over (l, e) in S of r[l, e]          r: mean use over the prompts of the behaviour

Sets of equal size may still fire less, and then do less whatever they are. Each set here is drawn at random
and brought near the rate of the given one by exchanging single experts. Status: our choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from regard.errors import RegardError

Expert = tuple[int, int]
WITHIN = 0.1
TRIES = 200


@dataclass(frozen=True)
class MatchedSets:
    """Random sets.

    Attributes:
        sets: of experts, all different, none with an expert of the given set.
        rates: how much each fires, as a share of what the given set does.
    """

    sets: tuple[tuple[Expert, ...], ...]
    rates: tuple[float, ...]


def firing_rates(use: Tensor, layers: Sequence[int]) -> dict[Expert, float]:
    """Return the mean use of every expert over prompts.

    Args:
        use, layers: from `record_experts`, [N, L, E].
    """
    mean: npt.NDArray[np.float64] = use.double().mean(0).numpy()
    places = zip(*np.nonzero(np.isfinite(mean)), strict=True)
    return {(layers[row], int(expert)): float(mean[row, expert]) for row, expert in places}


def matched_sets(
    rates: dict[Expert, float],
    like: Sequence[Expert],
    count: int = 10,
    *,
    seed: int = 0,
    within: float = WITHIN,
) -> MatchedSets:
    """Return random sets of as many experts as are given, which fire as much.

    Args:
        rates: from `firing_rates`.
        like: the given set.
        count: how many sets.
        within: how far a rate may be from the given one, as a share of it. Where no set comes so near, as the
            given experts fire more than any others, the nearest are taken; `rates` of the result tells.

    Raises:
        RegardError: where there are not enough other experts for so many sets.
    """
    source, given = random.Random(f"matched/{seed}"), set(like)
    free = sorted(set(rates) - given)
    if len(free) < len(like) or count < 1 or not like:
        raise RegardError(
            f"{count} sets of {len(like)} experts are needed, and {len(free)} other experts are left."
        )
    goal = sum(rates[expert] for expert in like)
    found: dict[tuple[Expert, ...], float] = {}
    for _ in range(TRIES * count):
        drawn = tuple(sorted(_near(rates, free, len(like), goal, within, source)))
        found.setdefault(drawn, sum(rates[expert] for expert in drawn))
        near = [one for one, rate in found.items() if abs(rate - goal) <= within * goal]
        if len(near) == count:
            break
    if len(found) < count:
        raise RegardError(
            f"only {len(found)} sets of {len(like)} other experts were found; {count} are needed."
        )
    best = sorted(found, key=lambda one: max(abs(found[one] - goal) - within * goal, 0.0))[:count]
    return MatchedSets(tuple(best), tuple(found[one] / goal if goal else 1.0 for one in best))


def _near(
    rates: dict[Expert, float],
    free: Sequence[Expert],
    size: int,
    goal: float,
    within: float,
    source: random.Random,
) -> list[Expert]:  # fmt: skip
    """A random set, exchanged expert by expert for random others as long as that brings it nearer."""
    chosen = source.sample(list(free), size)
    rest = [expert for expert in free if expert not in set(chosen)]
    total = sum(rates[expert] for expert in chosen)
    for _ in range(20 * size):
        if abs(total - goal) <= within * goal or not rest:
            break
        at, other = source.randrange(size), source.randrange(len(rest))
        moved = total - rates[chosen[at]] + rates[rest[other]]
        if abs(moved - goal) < abs(total - goal):
            chosen[at], rest[other], total = rest[other], chosen[at], moved
    return chosen
