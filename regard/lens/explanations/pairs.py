"""How far explanations of the same texts agree, every pair of methods, beside what random scores give.

Each text gives one number a pair; a cell is their mean with a 95 % interval (bootstrap over texts from ten
on, Student's t below). A number that is not defined, as where a method gives all tokens the same score, is
counted and left out, never taken for 0. Chance is what random scores reach: the spread of one text, from
random vectors against every method, over the root of the number of texts.

    told apart from chance    |mean| > 1.96 * sqrt(sum over texts of var of chance) / texts

Source: Neely et al., 2022, arXiv 2205.04559. Status: partly our choice (intervals and chance are ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError, ShapeMismatch
from regard.lens.explanations.measures import Top, chance_spread, check_measure, rank_agreement
from regard.runtime.table import Table, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]
WARNING = (
    "That methods agree does not show that any of them is right, and that attention disagrees with one of "
    "them does not show that attention is wrong: rank correlation should not be used to judge an explanation "
    "(Neely et al. 2022, arXiv 2205.04559). Use several methods, deletion and insertion, and people."
)
RANDOM = "random"
RESAMPLES, ENOUGH, DRAWS, LEAST_DRAWS = 2000, 10, 400, 8


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement of every pair of methods; the last is `random`.

    Attributes:
        methods: M names.
        values: of each text, float64 [texts, M, M]; NaN where not defined or a method has no scores.
        undefined: in how many texts a pair that has scores is not defined, int [M, M].
        chance: how far from 0 the mean of a pair must lie to be told apart from random scores, [M, M].
        lengths: tokens of each text.
        measure: with its k and p, in words.
        notes: what else must be known to read it.
    """

    methods: tuple[str, ...]
    values: Values
    undefined: npt.NDArray[np.int64]
    chance: Values
    lengths: tuple[int, ...]
    measure: str
    notes: tuple[str, ...] = ()
    warning: str = WARNING

    @property
    def count(self) -> npt.NDArray[np.int64]:
        """Over how many texts a cell is the mean."""
        return np.isfinite(self.values).sum(0)

    @property
    def mean(self) -> Values:
        """[M, M]; NaN where no text defines a pair."""
        return _over(np.nanmean, self.values)

    @property
    def std(self) -> Values:
        """Standard deviation over texts, [M, M]."""
        if len(self.values) < 2:
            return np.full(self.values.shape[1:], np.nan)
        return _over(lambda x, axis: np.nanstd(x, axis, ddof=1), self.values, least=2)

    @property
    def interval(self) -> tuple[Values, Values]:
        """Lower and upper ends of the 95 % intervals of the mean, [M, M]."""
        size = len(self.methods)
        ends = np.full((2, size, size), np.nan)
        for i, j in _pairs(size):
            known = self.values[:, i, j][np.isfinite(self.values[:, i, j])]
            ends[:, i, j] = ends[:, j, i] = interval_of(known)
        return ends[0], ends[1]

    @property
    def told(self) -> npt.NDArray[np.bool_]:
        """Which means lie beyond chance, bool [M, M]."""
        return np.abs(np.nan_to_num(self.mean)) > self.chance

    def of(self, first: str, second: str) -> Values:
        """Return the numbers of one pair, one a text.

        Raises:
            RegardError: for a method that was not compared.
        """
        for name in (first, second):
            if name not in self.methods:
                raise RegardError(f"no method {name!r} was compared; there are {', '.join(self.methods)}.")
        return self.values[:, self.methods.index(first), self.methods.index(second)]

    @property
    def table(self) -> Table:
        """One row a pair."""
        rows: dict[str, list[Any]] = {}
        mean, std, (low, high), told, count = self.mean, self.std, self.interval, self.told, self.count
        for i, j in _pairs(len(self.methods)):
            row = {
                "first": self.methods[i], "second": self.methods[j], "mean": mean[i, j], "low": low[i, j],
                "high": high[i, j], "std": std[i, j], "texts": int(count[i, j]),
                "undefined": int(self.undefined[i, j]), "chance": self.chance[i, j],
                "beyond chance": "yes" if told[i, j] else "no",
            }  # fmt: skip
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
        return Table(rows)

    @property
    def matrix(self) -> Table:
        """The means with their standard deviations, one row a method; `~` where chance reaches as far."""
        mean, std, told = self.mean, self.std, self.told

        def cell(i: int, j: int) -> str:
            if i == j or not np.isfinite(mean[i, j]):
                return "1" if i == j else "-"
            spread = f" ± {std[i, j]:.2f}" if np.isfinite(std[i, j]) else ""
            return f"{mean[i, j]:.2f}{spread}{'' if told[i, j] else ' ~'}"

        size = range(len(self.methods))
        columns = {name: [cell(i, j) if j <= i else "" for i in size] for j, name in enumerate(self.methods)}
        return Table({"": list(self.methods), **columns})

    def said(self) -> tuple[str, ...]:
        """Return in sentences how to read the numbers: texts, chance, what was left out, the warning."""
        told = [self.told[i, j] for i, j in self._real_pairs()]
        shortest, longest, texts = min(self.lengths), max(self.lengths), len(self.lengths)
        tokens = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        said = [
            f"{self.measure} over {texts} text{'s' * (texts != 1)} of {tokens} tokens; ± is the standard "
            "deviation over texts.",
            f"{len(told) - sum(told)} of {len(told)} pairs of methods cannot be told from random scores (~).",
        ]
        undefined = sum(int(self.undefined[i, j]) for i, j in _pairs(len(self.methods)))
        if undefined:
            said.append(
                f"{undefined} numbers are not defined, as where all scores are equal; they are left out."
            )
        return (*said, *self.notes, self.warning)

    def _real_pairs(self) -> list[tuple[int, int]]:
        last = len(self.methods) - 1
        return [(i, j) for i, j in _pairs(last + 1) if RANDOM not in (self.methods[i], self.methods[j])]

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return one line a pair, comma-separated; written too, given `path`."""
        return self.table.to_csv(path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the matrix as a Markdown table, with the sentences under it; written too, given `path`."""
        names = list(self.matrix.columns)
        lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
        lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in self.matrix.rows()]
        text = "\n".join([*lines, "", *(f"{sentence}\n" for sentence in self.said())])
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the matrix as a heat map, cells within chance hatched.

        Raises:
            RegardError: where matplotlib is not installed, or the path cannot be written.
        """
        from regard.lens.explanations.picture import draw_agreement

        return draw_agreement(self, path)

    def __str__(self) -> str:
        return "\n".join([str(self.matrix), "", *self.said()])

    def _repr_html_(self) -> str:
        from html import escape

        return self.matrix._repr_html_() + "".join(f"<p>{escape(s)}</p>" for s in self.said())


def agreement(
    scores: Mapping[str, Any],
    measure: str = "kendall",
    *,
    k: Top = 5,
    p: float = 0.5,
    drop_first: bool = False,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Agreement:
    """Compare every pair of methods on the same texts.

    Args:
        scores: method -> one vector [n] a text, in the same order, None where it has none for a text; or a
            single vector. Larger = more important.
        measure: "kendall", "weighted", "spearman", "pearson", "ap" or "topk".
        k, p: of `topk`: buckets of equal scores, and what a tie in one of the two costs.
        drop_first: leave out the first token, which attention of causal models favours whatever it is.
        seed: of the random scores.
        notes: sentences to be shown with the result.

    Raises:
        ShapeMismatch: where methods have different numbers of texts, or of scores in one.
        RegardError: for an unknown measure or a k below 1, fewer than two tokens in a text, or fewer than two
            methods.

    Example:
        >>> found = agreement({"a": [[3.0, 2.0, 1.0]], "b": [[9.0, 5.0, 4.0]]})
        >>> float(found.of("a", "b")[0])
        1.0
    """
    check_measure(measure, k, p)
    vectors, lengths = _checked(scores, drop_first)
    generator = np.random.default_rng(seed)
    draws = max(LEAST_DRAWS, DRAWS // len(lengths))
    methods = (*vectors, RANDOM)
    size = len(methods)
    values = np.full((len(lengths), size, size), np.nan)
    undefined = np.zeros((size, size), dtype=np.int64)
    spread = np.full((len(lengths), size), np.nan)
    for text, length in enumerate(lengths):
        noise = generator.random((draws, length))
        told = [*(found[text] for found in vectors.values()), noise[0]]
        for i, x in enumerate(told):
            if x is None:
                continue
            values[text, i, i] = 1.0 if np.ptp(x) else np.nan
            undefined[i, i] += not np.ptp(x)
            for j in range(i):
                if told[j] is not None:
                    found = rank_agreement(x, told[j], measure, k=k, p=p)
                    values[text, i, j] = values[text, j, i] = found
                    undefined[[i, j], [j, i]] += np.isnan(found)
            spread[text, i] = chance_spread(x, noise[1:], measure, k, p)
    return Agreement(
        methods, values, undefined, _chance(values, spread), lengths, _named(measure, k, p),
        (*notes, *(("The first token of every text is left out.",) if drop_first else ())),
    )  # fmt: skip


def interval_of(values: Values) -> tuple[float, float]:
    """Return the 95 % interval of a mean: bootstrap from ten values on, Student's t below, NaN for one."""
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) <= 1e-12:
        return float(values.mean()), float(values.mean())
    if len(values) < ENOUGH:
        from scipy import stats

        ends = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        return float(ends.low), float(ends.high)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _chance(values: Values, spread: Values) -> Values:
    """1.96 standard errors of a mean over texts of what random scores give."""
    both = (spread[:, :, None] + spread[:, None, :]) / 2
    both = np.where(np.isfinite(values), both, np.nan)
    count = np.maximum(1, np.isfinite(both).sum(0))
    return 1.96 * np.sqrt(np.nansum(both, 0)) / count


def _checked(
    scores: Mapping[str, Any], drop_first: bool
) -> tuple[dict[str, list[Values | None]], tuple[int, ...]]:
    """Return vectors by method and the length of each text."""
    if len(scores) < 2:
        raise RegardError(f"agreement compares methods, and got {len(scores)}; give two or more.")
    if RANDOM in scores:
        raise RegardError(f"{RANDOM!r} is what methods are compared with; name yours something else.")
    found: dict[str, list[Values | None]] = {}
    for name, given in scores.items():
        single = len(given) > 0 and np.ndim(given[0]) == 0 and given[0] is not None
        texts = [given] if single else list(given)
        vectors = [None if x is None else np.asarray(x, dtype=np.float64) for x in texts]
        found[name] = [x[1:] if drop_first and x is not None else x for x in vectors]
    counts = {name: len(texts) for name, texts in found.items()}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        raise ShapeMismatch(
            f"methods have scores of {counts} texts; all must have the same texts, at least one."
        )
    lengths = []
    for text in range(next(iter(counts.values()))):
        given_here = {name: x[text] for name, x in found.items()}
        sizes = {name: len(x) for name, x in given_here.items() if x is not None}
        if len(set(sizes.values())) > 1:
            raise ShapeMismatch(
                f"text {text} has {sizes} scores; a text has one score a token, by all methods."
            )
        length = next(iter(sizes.values()), 2)
        if length < 2:
            raise ShapeMismatch(f"text {text} has {length} token to compare; two are needed.")
        lengths.append(length)
    return found, tuple(lengths)


def _named(measure: str, k: Top, p: float) -> str:
    if measure == "topk":
        top = f"{k:.0%} of the" if isinstance(k, float) else str(k)
        return f"top-k Kendall, k = {top}, p = {p:g}"
    names = {"kendall": "Kendall's tau-b", "weighted": "weighted tau", "spearman": "Spearman's rho",
             "pearson": "Pearson's r", "ap": "tau_AP-b"}  # fmt: skip
    return names[measure]


def _pairs(size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(size) for j in range(i + 1, size)]


def _over(function: Any, values: Values, least: int = 1) -> Values:
    """A function over texts that ignores NaN, and NaN where fewer than `least` are known."""
    known = np.isfinite(values).sum(0)
    filled = np.where(known >= least, values, 0.0)
    return np.where(known >= least, function(filled, axis=0), np.nan)
