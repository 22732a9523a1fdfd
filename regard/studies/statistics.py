"""Means and contrasts with intervals, by scipy: bootstrap from ten values on, Student's t below.

The bootstrap is bias-corrected and accelerated (Efron 1987). With fewer than ten values it is known to be
too narrow, and Student's t (Welch's, where two independent samples are compared) takes its place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
DRAWS = 9999
ENOUGH = 10
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: the estimate.
        low: lower end of the 95 % interval; None where there is a single value, or one is not a number.
        high: upper end.
        method: how the interval was found.
        p: of a permutation test that the contrast is zero, two-sided; None for a mean.
    """

    value: float
    low: float | None
    high: float | None
    method: str
    p: float | None = None


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean with its 95 % interval.

    Example:
        >>> found = mean([0.0, 1.0, 2.0])
        >>> round(found.value, 2), round(found.low, 2), round(found.high, 2)
        (1.0, -1.48, 3.48)
    """
    x = np.asarray(values, dtype=np.float64)
    return _one(x)


def contrast(
    measure: Sequence[float], control: Sequence[float], *, factor: float = 1.0, paired: bool = False
) -> Estimate:
    """Return `mean(measure) - factor * mean(control)` with its 95 % interval and a permutation test.

    Args:
        measure: values.
        control: values; as many as `measure`, in the same order, where paired.
        factor: the control is multiplied by it first.
        paired: take differences pair by pair.
    """
    a = np.asarray(measure, dtype=np.float64)
    b = factor * np.asarray(control, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Estimate(math.nan, None, None, "a value is not a number")
    found = _one(a - b) if paired else _two(a, b)
    return Estimate(found.value, found.low, found.high, found.method, permutation_p(a, b, paired=paired))


def permutation_p(a: Values, b: Values, *, paired: bool) -> float | None:
    """Return the two-sided p of a permutation test of equal means; None where a sample has one value.

    Exact where the permutations are few, else 9999 random ones from a fixed seed.
    """
    from scipy import stats

    if min(len(a), len(b)) < 2:
        return None
    done = stats.permutation_test(
        (a, b),
        _difference,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=DRAWS,
        rng=np.random.default_rng(0),
    )
    return float(done.pvalue)


def _difference(a: Any, b: Any, axis: int = -1) -> Any:
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


def _one(x: Values) -> Estimate:
    from scipy import stats

    if not np.isfinite(x).all() or not len(x):
        return Estimate(math.nan, None, None, "a value is not a number")
    value = float(x.mean())
    if len(x) == 1:
        return Estimate(value, None, None, "a single value")
    if _all_equal(x):
        return Estimate(value, value, value, f"all {len(x)} values are equal")
    if len(x) < ENOUGH:
        interval = stats.ttest_1samp(x, 0.0).confidence_interval(LEVEL)
        return Estimate(value, float(interval.low), float(interval.high), f"Student's t, {len(x)} values")
    return Estimate(value, *_bootstrap((x,), np.mean), f"bootstrap, {len(x)} values")


def _two(a: Values, b: Values) -> Estimate:
    from scipy import stats

    value = float(a.mean() - b.mean())
    if len(b) == 1:
        return _one(a - b[0])
    if len(a) == 1:
        return _one(a[0] - b)
    if _all_equal(a) and _all_equal(b):
        return Estimate(value, value, value, f"all values are equal, {len(a)} and {len(b)}")
    sizes = f"{len(a)} and {len(b)} values"
    if min(len(a), len(b)) < ENOUGH:
        with warnings.catch_warnings():  # one of the two may be constant, which Welch's t takes
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(LEVEL)
        return Estimate(value, float(interval.low), float(interval.high), f"Welch's t, {sizes}")
    return Estimate(value, *_bootstrap((a, b), _difference), f"bootstrap, {sizes}")


def _all_equal(x: Values) -> bool:
    """Whether values differ by rounding at most, so that their spread says nothing."""
    return bool(np.ptp(x) <= 1e-9 * np.abs(x).max())


def _bootstrap(samples: tuple[Values, ...], statistic: Any) -> tuple[float, float]:
    from scipy import stats

    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=DRAWS,
        confidence_level=LEVEL,
        method="BCa",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
