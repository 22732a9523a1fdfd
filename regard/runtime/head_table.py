"""Numbers per attention head: ranked, compared with another table and with chance."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from regard.errors import NoSuchSite, NothingObserved, RegardError, ShapeMismatch
from regard.runtime import head_file
from regard.runtime import head_statistics as statistics
from regard.runtime.head_statistics import Overlap
from regard.runtime.panels import MapPanel, head_map
from regard.runtime.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.runtime.tally import Tally

Head = tuple[str, int]
HeadName = tuple[str | int, int]


@dataclass(frozen=True, eq=False)
class HeadTable:
    """Columns of float64, one row a head; NaN where a head was not observed.

    Sites may differ in their number of heads. A head is named `(alias, head)`, or `(layer, head)`
    where all sites are of one kind, or for the kind named by `about["main"]`.

    Attributes:
        sites: the alias of each row's site, such as `text.12`.
        heads: the head number of each row, int64 [N].
        columns: name -> float64 [N].
        about: what the numbers are: lens, definition, model, tokens seen; plain JSON values.

    Raises:
        ShapeMismatch: where lengths differ, or a head stands in two rows.

    Example:
        >>> table = HeadTable.from_columns({"a.0": {"sink": [0.1, 0.9]}, "a.1": {"sink": [0.4]}})
        >>> table.top("sink", 2)
        [('a.0', 1, 0.9), ('a.1', 0, 0.4)]
        >>> table.grid("sink")
        array([[0.1, 0.9],
               [0.4, nan]])
    """

    sites: tuple[str, ...]
    heads: npt.NDArray[np.int64]
    columns: Mapping[str, npt.NDArray[np.float64]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sites = tuple(str(site) for site in self.sites)
        heads = np.asarray(self.heads, dtype=np.int64)
        columns = {str(k): np.asarray(v, dtype=np.float64) for k, v in self.columns.items()}
        for name, values in {"heads": heads, **columns}.items():
            if values.shape != (len(sites),):
                raise ShapeMismatch(
                    f"{name} has shape {values.shape} beside {len(sites)} sites; one value a row."
                )
        index = {(s, int(h)): i for i, (s, h) in enumerate(zip(sites, heads, strict=True))}
        if len(index) < len(sites):
            raise ShapeMismatch("a head stands in two rows of the table; one row a head.")
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "about", dict(self.about))
        object.__setattr__(self, "_index", index)

    @classmethod
    def from_columns(
        cls,
        values: Mapping[str, Mapping[str, Any]],
        *,
        about: Mapping[str, Any] | None = None,
    ) -> HeadTable:
        """Build a table from `{alias: {column: one value a head}}`.

        Args:
            values: vectors [H] of the site's heads; a column that a site lacks is NaN there.
            about: what the numbers are.

        Raises:
            ShapeMismatch: where two vectors of one site differ in length, or one is no vector.
            NothingObserved: where there is no site at all.
        """
        if not values:
            raise NothingObserved("no site was observed, so there is no table of heads.")
        names = list(dict.fromkeys(name for columns in values.values() for name in columns))
        sites: list[str] = []
        heads: list[int] = []
        parts: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in names}
        for alias in _ordered(values):
            vectors = {name: _vector(v, alias, name) for name, v in values[alias].items()}
            sizes = {name: len(v) for name, v in vectors.items()}
            if len(set(sizes.values())) > 1:
                raise ShapeMismatch(f"{alias} has columns of different numbers of heads: {sizes}.")
            size = next(iter(sizes.values()), 0)
            sites += [alias] * size
            heads += range(size)
            for name in names:
                parts[name].append(vectors.get(name, np.full(size, np.nan)))
        columns = {name: np.concatenate(vectors) for name, vectors in parts.items()}
        return cls(tuple(sites), np.array(heads, dtype=np.int64), columns, about or {})

    @classmethod
    def from_tally(
        cls,
        tally: Tally,
        quantities: Mapping[str, str],
        *,
        about: Mapping[str, Any] | None = None,
    ) -> HeadTable:
        """Build a table from what a lens has kept.

        Args:
            tally: where each quantity is a vector [H] per site.
            quantities: column -> name of the quantity in the tally.
            about: what the numbers are.
        """
        found = {column: tally.get(name) for column, name in quantities.items()}
        aliases = [alias for alias in tally.aliases if any(alias in v for v in found.values())]
        return cls.from_columns(
            {a: {c: v[a] for c, v in found.items() if a in v} for a in aliases}, about=about
        )

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, column: str) -> npt.NDArray[np.float64]:
        """Return one column, float64 [N], in the order of the rows."""
        if column not in self.columns:
            raise RegardError(f"no column {column!r}; the table has {', '.join(self.columns)}.")
        return self.columns[column]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site in the table, such as `('text',)` or `('encoder', 'decoder')`."""
        return tuple(dict.fromkeys(split(site)[0] for site in self.sites))

    @property
    def names(self) -> list[Head]:
        """Every row's `(alias, head)`."""
        return [(s, int(h)) for s, h in zip(self.sites, self.heads, strict=True)]

    def at(self, site: str | int, head: int) -> dict[str, float]:
        """Return every column's value of one head."""
        row = self._row((site, head))
        return {name: float(values[row]) for name, values in self.columns.items()}

    def grid(self, column: str, kind: str | None = None) -> npt.NDArray[np.float64]:
        """Return a column as [layers, heads], NaN where there is no such head.

        Args:
            kind: which kind of site; may be left out where the table has one.
        """
        values, kind = self[column], self._kind(kind)
        cells = [
            (split(site)[1], head, value)
            for site, head, value in zip(self.sites, self.heads, values, strict=True)
            if split(site)[0] == kind
        ]
        layers, heads = max(c[0] for c in cells) + 1, max(int(c[1]) for c in cells) + 1
        out = np.full((layers, heads), np.nan)
        for layer, head, value in cells:
            out[layer, head] = value
        return out

    @property
    def table(self) -> Table:
        """The same as a `Table`: site, head, then the columns."""
        return Table({"site": self.sites, "head": self.heads, **self.columns})

    def top(self, column: str, k: int, *, largest: bool = True) -> list[tuple[str, int, float]]:
        """Return the k heads of largest (or smallest) value as `(alias, head, value)`, best first.

        Heads that were not observed are left out; of equal ones the first comes first.
        """
        values = self[column]
        order = np.argsort(-values if largest else values, kind="stable")
        known = [i for i in order if not np.isnan(values[i])]
        return [(self.sites[i], int(self.heads[i]), float(values[i])) for i in known[: _count(k)]]

    def rank_correlation(self, other: HeadTable, column: str, *, other_column: str | None = None) -> float:
        """Return Spearman's rank correlation over the heads that both tables have observed.

        Equal values share their mean rank. NaN where either column is constant.

        Raises:
            NothingObserved: where fewer than two heads are shared.
        """
        mine, theirs, _ = self._shared(other, column, other_column)
        if len(mine) < 2:
            raise NothingObserved(f"the tables share {len(mine)} observed heads; two are needed.")
        return statistics.rank_correlation(mine, theirs)

    def overlap(
        self,
        other: HeadTable,
        column: str,
        k: int,
        *,
        other_column: str | None = None,
        largest: bool = True,
    ) -> Overlap:
        """Compare the k leading heads of two tables with what chance would give.

        Returns:
            Overlap: heads shared, their fraction, the fraction expected of two random sets, and the
            exact (hypergeometric) probability of at least as many.
        """
        mine, theirs, names = self._shared(other, column, other_column)
        if not 0 < k <= len(names):
            raise RegardError(f"{k=} heads of {len(names)} that both tables have observed.")
        sign = -1.0 if largest else 1.0
        best = [np.argsort(sign * values, kind="stable")[:k] for values in (mine, theirs)]
        first, second = ({names[i] for i in chosen} for chosen in best)
        return statistics.overlap(first, second, len(names))

    def auc(self, column: str, heads: Iterable[HeadName]) -> float:
        """Return how likely one of `heads` scores above one of the others; ties count half.

        Raises:
            NoSuchSite: where the table has no such head.
            NothingObserved: where one of `heads` was not observed, or no other head was.
        """
        values = self[column]
        chosen = {self._row(head) for head in heads}
        unseen = [self.names[i] for i in chosen if np.isnan(values[i])]
        if unseen:
            raise NothingObserved(f"{column} was not observed for {unseen[:3]}.")
        others = [i for i in np.flatnonzero(~np.isnan(values)) if i not in chosen]
        if not chosen or not others:
            raise NothingObserved(
                f"an AUC compares some heads with others; here {len(chosen)} with {len(others)}."
            )
        return statistics.auc(values[sorted(chosen)], values[others])

    def matched_random(
        self,
        heads: Iterable[HeadName],
        n: int,
        seed: int,
        *,
        avoid: Collection[HeadName] | None = None,
    ) -> list[list[Head]]:
        """Draw n control sets with as many heads of every site as `heads` has there.

        Args:
            seed: the same seed draws the same sets.
            avoid: heads never drawn; default `heads` themselves, `()` to draw from all.

        Raises:
            RegardError: where a site has too few heads left to draw from.
        """
        chosen = [self.names[self._row(head)] for head in heads]
        barred = {self.names[self._row(h)] for h in (chosen if avoid is None else avoid)}
        need: dict[str, int] = {}
        for site, _ in chosen:
            need[site] = need.get(site, 0) + 1
        pools = {s: [h for h in self.names if h[0] == s and h not in barred] for s in need}
        for site, count in need.items():
            if count > len(pools[site]):
                raise RegardError(
                    f"{site} has {len(pools[site])} heads to draw from, {count} are needed; "
                    "give avoid=() to draw from all of its heads."
                )
        source = random.Random(seed)
        return [
            [head for site, count in need.items() for head in sorted(source.sample(pools[site], count))]
            for _ in range(_count(n))
        ]

    def plot(self, column: str | None = None, path: str | Path | None = None) -> Figure:
        """Draw a column (default: the first) as a heat map, layers by heads, one panel a kind.

        Args:
            path: also write the picture there; its ending says the format.

        Raises:
            RegardError: where matplotlib is not installed, or the path cannot be written.
        """
        from regard.runtime.head_view import draw

        return draw(self, column or next(iter(self.columns)), path)

    def panels(self) -> tuple[MapPanel, ...]:
        """Return all columns as one map of heads."""
        return (head_map(self),)

    def _repr_html_(self) -> str:
        from regard.runtime.head_view import as_html

        return as_html(self)

    def __str__(self) -> str:
        return str(self.table)

    def __repr__(self) -> str:
        columns = ", ".join(self.columns)
        return f"HeadTable({len(self)} heads of {len(set(self.sites))} sites: {columns})"

    def to_csv(self, path: str | Path) -> None:
        """Write one row a head, comma-separated."""
        self.table.to_csv(path)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, whole or not at all; NaN is written as null.

        Raises:
            RegardError: where `about` holds what JSON cannot, or the path cannot be written.
        """
        head_file.write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> HeadTable:
        """Read what `save` wrote.

        Raises:
            RegardError: where the file is missing or is not such a table.
        """
        return cls(**head_file.read(path))

    def _kind(self, kind: str | None) -> str:
        kinds = self.kinds
        if kind is None and len(kinds) == 1:
            return kinds[0]
        if kind is None and self.about.get("main") in kinds:
            return str(self.about["main"])
        if kind not in kinds:
            raise NoSuchSite(f"{kind=} of site; the table has {', '.join(kinds)}.")
        return kind

    def _row(self, head: HeadName) -> int:
        site, number = head[0], int(head[1])
        alias = f"{self._kind(None)}.{site}" if isinstance(site, int) else site
        index: dict[Head, int] = self._index  # type: ignore[attr-defined]
        if (alias, number) not in index:
            known = [h for s, h in index if s == alias]
            found = f"it has heads 0 to {max(known)}" if known else "the table has no such site"
            raise NoSuchSite(f"head {number} of {alias}: {found}.")
        return index[alias, number]

    def _shared(
        self, other: HeadTable, column: str, other_column: str | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], list[Head]]:
        mine = dict(zip(self.names, self[column], strict=True))
        theirs = dict(zip(other.names, other[other_column or column], strict=True))
        names = [n for n in mine if n in theirs and not np.isnan(mine[n] + theirs[n])]
        return np.array([mine[n] for n in names]), np.array([theirs[n] for n in names]), names


def split(alias: str) -> tuple[str, int]:
    """Split `text.12` into ('text', 12)."""
    kind, dot, layer = alias.rpartition(".")
    if not dot or not layer.isdigit():
        raise NoSuchSite(f"{alias!r} is no site's alias, which is a kind and a number: text.12.")
    return kind, int(layer)


def _ordered(aliases: Iterable[str]) -> Sequence[str]:
    """Kinds in the order first seen, layers ascending within."""
    aliases = list(aliases)
    kinds = list(dict.fromkeys(split(alias)[0] for alias in aliases))
    return sorted(aliases, key=lambda alias: (kinds.index(split(alias)[0]), split(alias)[1]))


def _vector(values: Any, alias: str, name: str) -> npt.NDArray[np.float64]:
    tolist = getattr(values, "tolist", None)
    vector = np.asarray(tolist() if callable(tolist) else list(values), dtype=np.float64)
    if vector.ndim != 1:
        raise ShapeMismatch(f"{name} of {alias} has shape {vector.shape}; one value a head.")
    return vector


def _count(number: int) -> int:
    if number < 1:
        raise RegardError(f"{number} asked for; ask for one or more.")
    return number
