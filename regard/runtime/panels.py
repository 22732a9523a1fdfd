"""What a result shows on a page: small typed pictures, drawn by the report without knowing the lens.

A lens' result offers them from an optional method `panels()`. Nothing here draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.image_panel import ImagePanel
from regard.runtime.table import Table

if TYPE_CHECKING:
    from regard.runtime.head_table import HeadTable

OWN_TEXT = "the text"
Head: TypeAlias = tuple[str, int]
Grid: TypeAlias = npt.NDArray[np.float64]
Tokens: TypeAlias = Sequence[str] | Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class MapPanel:
    """One or more quantities over the same rows and columns, one shown at a time.

    Where any value is negative its colours diverge from zero.

    Attributes:
        title: what is mapped.
        rows, columns: their labels.
        values: quantity -> [rows, columns]; NaN where there is none.
        sites: where a cell is a head, the alias of each row; a column is then the number of a head, and
            the panel joins the page's map of heads. None otherwise.
        note: definition and source, in a sentence.

    Raises:
        ShapeMismatch: where a grid is of another shape, or `sites` of another length.

    Example:
        >>> MapPanel(title="patched", rows=["0", "1"], columns=["The", "cat"],
        ...          values={"effect": [[0.1, -0.2], [0.0, 0.4]]}).signed("effect")
        True
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[str, Any]
    sites: Sequence[str] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        grids = {str(k): np.asarray(v, dtype=np.float64) for k, v in self.values.items()}
        shape = (len(self.rows), len(self.columns))
        for name, grid in grids.items():
            if grid.shape != shape:
                raise ShapeMismatch(f"{name} has shape {grid.shape}; rows and columns are {shape}.")
        if self.sites is not None and len(self.sites) != len(self.rows):
            raise ShapeMismatch(f"{len(self.sites)} sites beside {len(self.rows)} rows; one site a row.")
        object.__setattr__(self, "values", grids)

    def signed(self, quantity: str) -> bool:
        """Whether a quantity has negative values."""
        return bool((self.values[quantity] < 0).any())


@dataclass(frozen=True, kw_only=True, eq=False)
class PatternPanel:
    """What one head attends to.

    Attributes:
        site, head: whose.
        weights: [rows, keys]; pooled where `width` is above 1.
        queries, keys: the tokens, words or ids, one a row or key (before pooling); None for positions.
        width: positions in a row or column of `weights`.
        text: the name of what was read, where that is not the text of the section it is shown in.

    Raises:
        ShapeMismatch: where tokens and weights differ in length.
    """

    site: str
    head: int
    weights: Any
    queries: Tokens | None = None
    keys: Tokens | None = None
    width: int = 1
    text: str = OWN_TEXT

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float32)
        if weights.ndim != 2 or self.width < 1:
            raise ShapeMismatch(f"a pattern is [rows, keys]; this has shape {weights.shape}.")
        for tokens, size, what in ((self.queries, weights.shape[0], "queries"),
                                   (self.keys, weights.shape[1], "keys")):  # fmt: skip
            if tokens is not None and -(-len(tokens) // self.width) != size:
                raise ShapeMismatch(f"{len(tokens)} {what} in bins of {self.width} do not make {size}.")
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class TablePanel:
    """A table; its rows may each stand for a head, and then open it.

    Attributes:
        heads: one a row, None where a row has none.
    """

    title: str
    table: Table
    heads: Sequence[Head | None] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.heads is not None and len(self.heads) != len(self.table):
            raise ShapeMismatch(f"{len(self.heads)} heads beside {len(self.table)} rows; one a row.")


@dataclass(frozen=True, kw_only=True, eq=False)
class LinePanel:
    """One or more lines over the same points.

    Attributes:
        x: the points' labels, such as blocks or positions.
        lines: name -> one number a point; NaN where there is none.
        x_label, y_label: what the axes are.
        log: whether the vertical axis is logarithmic; numbers of zero and below are then not drawn.
    """

    title: str
    x: Sequence[Any]
    lines: Mapping[str, Sequence[float]]
    x_label: str = ""
    y_label: str = ""
    log: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for name, values in self.lines.items():
            if len(values) != len(self.x):
                raise ShapeMismatch(f"{name} has {len(values)} numbers for {len(self.x)} points.")


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        name: unlike every other node's.
        column: where it stands from left to right, such as its layer.
        label: what is written on it; default its name.
        head: the head it stands for, or None.
    """

    name: str
    column: int
    label: str = ""
    head: Head | None = None


@dataclass(frozen=True)
class Link:
    """A directed edge between two nodes, with its weight."""

    source: str
    target: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphPanel:
    """A directed graph in columns, such as a circuit: an edge is as broad as its weight is large.

    Raises:
        RegardError: where two nodes share a name, or an edge names none.
    """

    title: str
    nodes: Sequence[Node]
    links: Sequence[Link] = field(default=())
    note: str = ""

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            raise RegardError(f"two nodes of {self.title!r} have the same name.")
        for link in self.links:
            for end in (link.source, link.target):
                if end not in set(names):
                    raise RegardError(f"an edge of {self.title!r} names {end!r}, which is no node.")


Panel: TypeAlias = MapPanel | PatternPanel | TablePanel | LinePanel | GraphPanel | ImagePanel


def head_map(table: HeadTable) -> MapPanel:
    """Return all columns of a head table as a map of heads, sites down and heads across."""
    sites = list(dict.fromkeys(table.sites))
    place = {site: row for row, site in enumerate(sites)}
    across = int(table.heads.max()) + 1 if len(table) else 0
    grids = {name: np.full((len(sites), across), np.nan) for name in table.columns}
    rows = [place[site] for site in table.sites]
    for name, values in table.columns.items():
        grids[name][rows, table.heads] = values
    source = str(table.about.get("source", ""))
    note = str(table.about.get("definition", "")) + (f" ({source})" if source else "")
    return MapPanel(
        title=str(table.about.get("lens", "heads")), rows=sites, columns=[str(h) for h in range(across)],
        values=grids, sites=sites, note=note,
    )  # fmt: skip
