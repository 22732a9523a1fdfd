"""What changed per head between two runs over the same input, beside what changes anyway between two texts.

    change = after - before                                       one number a head and quantity
    noise  = 95th percentile over heads of |second - first|       two texts, the model unchanged

A head counts as changed in a quantity where |change| exceeds the noise: what a change of model or an edit
did is told from what a change of text does. A model compared with itself changes nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from regard.errors import NothingObserved, ShapeMismatch
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.panels import MapPanel, head_map
from regard.runtime.table import Table

if TYPE_CHECKING:
    from regard.runtime.session import Session

NOISE = 95


@dataclass(frozen=True, eq=False)
class Difference:
    """One lens' numbers per head, before and after.

    Attributes:
        before, after: over the same heads.
        noise: column -> how much 95 % of the heads stay under between two texts; empty where not measured,
            and then every head that moved at all counts as changed.
        about: what was compared.

    Raises:
        ShapeMismatch: where the two have other heads or columns.

    Example:
        >>> before = HeadTable.from_columns({"text.0": {"score": [0.1, 0.9]}})
        >>> after = HeadTable.from_columns({"text.0": {"score": [0.1, 0.2]}})
        >>> found = difference(before, after)
        >>> found.changed("score"), round(found.change("score")[1], 2).item()
        ([('text.0', 1)], -0.7)
    """

    before: HeadTable
    after: HeadTable
    noise: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.before.names != self.after.names:
            raise ShapeMismatch(
                f"before there are {len(self.before)} heads in {len(set(self.before.sites))} sites, after "
                f"{len(self.after)} in {len(set(self.after.sites))}; a difference takes the same heads."
            )
        if set(self.before.columns) != set(self.after.columns):
            odd = sorted(set(self.before.columns) ^ set(self.after.columns))
            raise ShapeMismatch(f"only one side has the columns {', '.join(odd)}; give the lenses alike.")

    @property
    def columns(self) -> list[str]:
        """The quantities compared."""
        return list(self.before.columns)

    def change(self, column: str) -> npt.NDArray[np.float64]:
        """Return after - before, float64 [N], in the order of the rows; NaN where either was not seen."""
        return self.after[column] - self.before[column]

    def changed(self, column: str) -> list[Head]:
        """Return the heads that changed by more than the noise, the most changed first."""
        size = np.abs(self.change(column))
        limit = self.noise.get(column, 0.0)
        beyond = [i for i in np.argsort(-size, kind="stable") if size[i] > limit]
        return [self.before.names[i] for i in beyond]

    @property
    def quantities(self) -> Table:
        """One row a quantity: means, mean absolute change, noise, heads changed, and rank correlation."""
        rows: dict[str, list[Any]] = {}
        for column in self.columns:
            size = np.abs(self.change(column))
            row = {
                "quantity": column,
                "before": _mean(self.before[column]),
                "after": _mean(self.after[column]),
                "change": _mean(size),
                "noise": self.noise.get(column, float("nan")),
                "heads": len(self.changed(column)),
                "rank_correlation": self._correlation(column),
            }
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
        return Table(rows)

    @property
    def table(self) -> HeadTable:
        """One row a head; per quantity its value before and after, and the change."""
        columns: dict[str, npt.NDArray[np.float64]] = {}
        for column in self.columns:
            columns[f"{column} before"] = self.before[column]
            columns[f"{column} after"] = self.after[column]
            columns[f"{column} change"] = self.change(column)
        return HeadTable(self.before.sites, self.before.heads, columns, {**self.before.about, **self.about})

    def panels(self) -> tuple[MapPanel, ...]:
        """Return a map of heads, coloured by the change in each quantity."""
        changes = {f"{column}: change": self.change(column) for column in self.columns}
        about = {"lens": self.before.about.get("lens", "heads"), "definition": "after minus before"}
        return (head_map(HeadTable(self.before.sites, self.before.heads, changes, about)),)

    def _correlation(self, column: str) -> float:
        try:
            return self.before.rank_correlation(self.after, column)
        except NothingObserved:
            return float("nan")

    def __str__(self) -> str:
        return str(self.quantities)

    def _repr_html_(self) -> str:
        return self.quantities._repr_html_()


def difference(
    before: HeadTable, after: HeadTable, noise: tuple[HeadTable, HeadTable] | None = None
) -> Difference:
    """Compare one lens' numbers of two runs over the same input.

    Args:
        before, after: results of the same lens.
        noise: its results on two other texts of one kind, the model unchanged: the control.

    Raises:
        ShapeMismatch: where heads or columns are not the same.
    """
    limits: dict[str, float] = {}
    if noise is not None:
        between = Difference(*noise)
        for column in before.columns:
            size = np.abs(between.change(column))
            size = size[np.isfinite(size)]
            limits[column] = float(np.percentile(size, NOISE)) if len(size) else float("nan")
    return Difference(before, after, limits)


def differences(
    before: Session, after: Session, noise: tuple[Session, Session] | None = None
) -> dict[str, Difference]:
    """Compare what two sessions with the same lenses have seen.

    Args:
        before, after: run over the same input; of two models, or of one with and without edits.
        noise: two more sessions of the first model, over two texts: the control.

    Returns:
        name of the lens -> its `Difference`; lenses without numbers per head are left out.

    Raises:
        NothingObserved: where the two share no lens with numbers per head.

    Example:
        >>> with regard.watch(model, Induction()) as before:              # doctest: +SKIP
        ...     model(**inputs)
        >>> with regard.steer(model, edit), regard.watch(model, Induction()) as after:     # doctest: +SKIP
        ...     model(**inputs)
        >>> differences(before, after)["Induction"].changed("score")      # doctest: +SKIP
    """
    found = {}
    for name in before.lenses:
        if name not in after.lenses:
            continue
        sides = [heads_of(session[name]) for session in (before, after)]
        if sides[0] is None or sides[1] is None:
            continue
        texts = [heads_of(session[name]) for session in noise or ()]
        control = (texts[0], texts[1]) if len(texts) == 2 and texts[0] and texts[1] else None
        found[name] = difference(sides[0], sides[1], control)
    if not found:
        raise NothingObserved("the two sessions share no lens that has numbers per head.")
    return found


def heads_of(result: Any) -> HeadTable | None:
    """Return the numbers per head of a lens' result, or None where it has none."""
    found = result if isinstance(result, HeadTable) else getattr(result, "heads", None)
    return found if isinstance(found, HeadTable) else None


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
