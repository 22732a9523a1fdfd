"""How far two rankings of the same tokens agree: one number for two score vectors, larger = more important.

    kendall       tau-b = (C - D) / sqrt((N - Tx)(N - Ty)),  N = n(n-1)/2, Tx, Ty tied pairs     scipy
    weighted      tau with w(r_i) + w(r_j) a pair, w(r) = 1 / (r + 1)                            scipy
    spearman, pearson                                                                            scipy
    ap            tau_AP-b: mean of s(x, y) and s(y, x),
                  s(x, y) = 2 / m * sum_i c_i / (p_i - 1) - 1
                  over the m items below the first group of y; p_i the rank of an item's group, c_i how many
                  items of groups above it are above it in x too
    topk          1 - 2 * penalty / pairs, see `top_k`

A measure that is not defined, as where all scores of one side are equal, is NaN, never 0.

Sources: Neely et al., 2022, arXiv 2205.04559 (which measures); Fagin et al., 2004, "Comparing and aggregating
rankings with ties" (top-k); Yilmaz et al., 2008, and Urbano and Marrero, 2017 (AP correlation, with ties).
Status: top-k agrees with the official code; tau_AP-b with the definition of Urbano and Marrero's R package.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError, ShapeMismatch

MEASURES = ("kendall", "weighted", "spearman", "pearson", "ap", "topk")
NONZERO = "nonzero"
SOME = 20
Scores = npt.NDArray[np.float64]
Top = int | float | str


def rank_agreement(x: Any, y: Any, measure: str = "kendall", *, k: Top = 5, p: float = 0.5) -> float:
    """Return how far two score vectors agree, from -1 to 1; NaN where that is not defined.

    Args:
        x, y: scores of the same n tokens, larger = more important.
        measure: one of `MEASURES`.
        k, p: of `topk`, see `top_k`.

    Raises:
        ShapeMismatch: for vectors of unequal length, or of fewer than two tokens.
        RegardError: for an unknown measure, scores that are not finite, or a k or p that will not do.

    Example:
        >>> rank_agreement([3.0, 2.0, 1.0], [0.9, 0.5, 0.4])
        1.0
        >>> rank_agreement([3.0, 2.0, 1.0], [1.0, 1.0, 1.0])
        nan
    """
    a, b = _checked(x, y)
    check_measure(measure, k, p)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    if measure == "topk":
        return top_k(a, b, k, p)
    if measure == "ap":
        return (_ap(a, b) + _ap(b, a)) / 2
    from scipy import stats

    found = {
        "kendall": stats.kendalltau, "weighted": stats.weightedtau, "spearman": stats.spearmanr,
        "pearson": stats.pearsonr,
    }[measure]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(found(a, b).statistic)


def chance_spread(x: Any, noise: Any, measure: str, k: Top, p: float) -> float:
    """Return the mean square of the agreement of scores [n] with random ones [N, n]; NaN where undefined.

    Kendall's tau of all of them is one product of signs; other measures take at most 20 of them.
    """
    a = np.asarray(x, dtype=np.float64)
    if np.ptp(a) == 0:
        return math.nan
    if measure != "kendall":
        return float(np.mean([rank_agreement(a, one, measure, k=k, p=p) ** 2 for one in noise[:SOME]]))
    upper = np.triu_indices(len(a), 1)
    first = np.sign(a[:, None] - a[None, :])[upper]
    second = np.sign(noise[:, upper[0]] - noise[:, upper[1]])
    taus = second @ first / np.sqrt(np.count_nonzero(first) * len(first))
    return float(np.square(taus).mean())


def check_measure(measure: str, k: Top, p: float) -> None:
    """Refuse an unknown measure, and a k or p of `topk` that will not do.

    Raises:
        RegardError: naming what is wrong.
    """
    if measure not in MEASURES:
        raise RegardError(f"measure is {measure!r}; it must be one of {', '.join(MEASURES)}.")
    if not 0 <= p <= 1:
        raise RegardError(f"p is {p}; it must be from 0 to 1.")
    if isinstance(k, str):
        good = k == NONZERO
    elif isinstance(k, bool):
        good = False
    else:
        good = k >= 1 if isinstance(k, int) else 0 < k <= 1
    if not good:
        raise RegardError(
            f"k is {k!r}; it must be a whole number from 1, a share above 0 and up to 1.0, or {NONZERO!r}."
        )


def top_k(x: Any, y: Any, k: Top = 5, p: float = 0.5) -> float:
    """Return the top-k Kendall correlation of two score vectors with ties.

    Scores are sorted descending into buckets of equal ones; a bucket's place is the mean rank of its members,
    and the top k are all members of the first k *buckets*. Over the pairs {i, j}, each once, with one in the
    top k of x and the other in the top k of y: a pair ordered oppositely costs 1, one tied in exactly one of
    the two costs p, any other nothing. Returned is 1 - 2 * cost / pairs.

    Args:
        x, y: scores of the same n tokens, larger = more important.
        k: buckets; a share of n, as a float up to 1.0, of which max(1, floor(n * share)) are taken; or
            "nonzero" for the smaller of the two counts of scores that are not zero.
        p: cost of a tie in one of the two.

    Raises:
        ShapeMismatch, RegardError: as `rank_agreement`.

    Example:
        >>> round(top_k([1, 2, 3, 1, 1, 2, 2], [3, 2, 1, 2, 1, 2, 1], k=2), 4)
        -0.5385
    """
    a, b = _checked(x, y)
    check_measure("topk", k, p)
    places = _places(a), _places(b)
    count = _count(a, b, k)
    inside = [np.isin(place, np.unique(place)[:count]) for place in places]
    pairs = np.triu(np.outer(*inside) | np.outer(*inside[::-1]), 1)
    first, second = (np.sign(place[:, None] - place[None, :])[pairs] for place in places)
    cost = (first * second < 0).sum() + p * ((first == 0) != (second == 0)).sum()
    return float(1 - 2 * cost / max(1, int(pairs.sum())))


def _count(a: Scores, b: Scores, k: Top) -> int:
    if isinstance(k, str):
        return max(1, min(int(np.count_nonzero(a)), int(np.count_nonzero(b))))
    return k if isinstance(k, int) else max(1, math.floor(len(a) * k))


def _places(x: Scores) -> Scores:
    """The mean rank of each item's bucket, 1 for the largest."""
    from scipy import stats

    return np.asarray(stats.rankdata(-x), dtype=np.float64)


def _ap(x: Scores, y: Scores) -> float:
    """s(x, y), with y the ranking whose top counts."""
    from scipy import stats

    group = stats.rankdata(-y, method="min")
    above_y = group[None, :] < group[:, None]
    above_x = x[None, :] > x[:, None]
    below = group > 1
    shares = (above_y & above_x).sum(1)[below] / (group[below] - 1)
    return float(2 * shares.mean() - 1)


def _checked(x: Any, y: Any) -> tuple[Scores, Scores]:
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if a.ndim != 1 or b.ndim != 1 or len(a) != len(b):
        raise ShapeMismatch(f"scores are of shapes {a.shape} and {b.shape}; both must be of the same [n].")
    if len(a) < 2:
        raise ShapeMismatch(f"scores of {len(a)} token have no ranking; give two tokens or more.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise RegardError("scores must be finite numbers; these hold NaN or infinity.")
    return a, b
