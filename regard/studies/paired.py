"""Does a treatment help, on the same items, and more than a placebo of the same kind does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regard.errors import RegardError
from regard.studies.statistics import Estimate, contrast

Scores = Sequence[float]


@dataclass(frozen=True)
class Paired:
    """A treatment against the baseline, item by item.

    Attributes:
        name: of the treatment.
        items: how many were scored.
        baseline: mean score without it; `treated` with it.
        effect: treated minus baseline, with its 95 % interval and the p of a permutation test.
        placebo: the placebo's effect, likewise; None without a placebo.
        over_placebo: treated minus placebo; None without a placebo.
        p: of the effect, corrected for as many treatments as were tried (Holm, 1979); `p_over_placebo` of the
            difference to the placebo. None where there are fewer than two items.
    """

    name: str
    items: int
    baseline: float
    treated: float
    effect: Estimate
    placebo: Estimate | None
    over_placebo: Estimate | None
    p: float | None
    p_over_placebo: float | None


def compare_paired(
    treated: Mapping[str, Scores], baseline: Scores, placebo: Scores | Sequence[Scores] | None = None
) -> list[Paired]:
    """Compare treatments with the baseline, and with a placebo, on the same items.

    Args:
        treated: name -> a score for each item, as accuracy 0 or 1 or a log-likelihood.
        baseline: as many scores, of the same items in the same order.
        placebo: scores under something of the same size that should do nothing, such as a random direction
            of equal norm; several of them are averaged item by item.

    Returns:
        The treatments in their order.

    Raises:
        RegardError: without treatments or items, where scores are not as many, or one is not a number.

    Example:
        >>> [found] = compare_paired({"edit": [1, 1, 1, 0]}, [1, 0, 0, 0], placebo=[1, 0, 1, 0])
        >>> found.effect.value, found.over_placebo.value
        (0.5, 0.25)
    """
    if not treated or not len(baseline):
        raise RegardError("a paired comparison needs a treatment, and an item at least.")
    base = _checked("the baseline", baseline, len(baseline))
    rows = {name: _checked(name, scores, len(base)) for name, scores in treated.items()}
    sham = None if placebo is None else _placebo(placebo, len(base))
    effects = [contrast(row, base, paired=True) for row in rows.values()]
    over = [None if sham is None else contrast(row, sham, paired=True) for row in rows.values()]
    corrected = holm([effect.p for effect in effects])
    corrected_over = holm([None if one is None else one.p for one in over])
    shams = None if sham is None else contrast(sham, base, paired=True)
    return [
        Paired(name, len(base), float(np.mean(base)), float(np.mean(row)), effect, shams, more, p, q)
        for (name, row), effect, more, p, q in zip(
            rows.items(), effects, over, corrected, corrected_over, strict=True
        )
    ]


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for how many they are, by the step-down rule of Holm (1979).

    The chance of a single false finding among all of them stays under the level, whatever their dependence.

    Args:
        p: of the tests; None where one could not be made, which stays None and does not count.

    Example:
        >>> holm([0.01, 0.04, None])
        [0.02, 0.04, None]
    """
    known = sorted((value, at) for at, value in enumerate(p) if value is not None)
    found: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, at) in enumerate(known):
        largest = min(1.0, max(largest, (len(known) - rank) * value))
        found[at] = largest
    return found


def _checked(name: str, scores: Scores, items: int) -> list[float]:
    if len(scores) != items:
        raise RegardError(f"{name} has {len(scores)} scores, and the baseline {items}; give the same items.")
    values = [float(score) for score in scores]
    if not np.isfinite(values).all():
        raise RegardError(f"{name} has a score that is not a number.")
    return values


def _placebo(placebo: Scores | Sequence[Scores], items: int) -> list[float]:
    if len(placebo) and isinstance(placebo[0], Sequence):
        each = [_checked(f"placebo {number}", one, items) for number, one in enumerate(placebo)]  # type: ignore[arg-type]
        return [float(value) for value in np.mean(each, axis=0)]
    return _checked("the placebo", placebo, items)  # type: ignore[arg-type]
