"""What the page's script reads: panels, findings and patterns as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from regard.report.images import Kept
from regard.report.words import pieces, words
from regard.runtime.panels import (
    GraphPanel,
    Head,
    LinePanel,
    MapPanel,
    Panel,
    PatternPanel,
    TablePanel,
    Tokens,
)

Json = Any


def safe(text: str) -> str:
    """Return text with what cannot be seen in it, but spaces, written out."""
    parts = pieces(str(text)) if text else [""]
    return "".join(" " if at % 2 and part == "·" else part for at, part in enumerate(parts))


class Places:
    """Sites by row and texts by number, each noted once.

    Args:
        tokens: a tokenizer, words, or None: see `words`.
    """

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens
        self.sites: dict[str, int] = {}
        self.heads: list[int] = []
        self.kept: dict[str, Kept] = {}
        self.texts: list[Json] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def row(self, site: str, heads: int = 1) -> int:
        """Return the row of a site, which has at least so many heads."""
        row = self.sites.setdefault(site, len(self.sites))
        if row == len(self.heads):
            self.heads.append(0)
        self.heads[row] = max(self.heads[row], heads)
        return row

    def keep(self, site: str, kept: Kept) -> int:
        """Return the row of a site of which the page has some heads, in this order."""
        self.kept[site] = kept
        return self.row(site, len(kept.heads))

    def head(self, head: Head) -> list[int]:
        """Return the row and the place in it of a head; the first place for one that is not there."""
        site, number = head[0], int(head[1])
        if site in self.kept:
            heads = self.kept[site].heads
            return [self.row(site), heads.index(number) if number in heads else 0]
        return [self.row(site, number + 1), number]

    def line(self, site: str, values: list[Json]) -> list[Json]:
        """Bring one number a head to the places that the page has of a site."""
        if site not in self.kept:
            return values
        return [values[head] if head < len(values) else None for head in self.kept[site].heads]

    def text(self, tokens: Tokens | None) -> int | None:
        """Return the number of a text, given by words or ids."""
        if tokens is None:
            return None
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = len(self.texts)
            self.texts.append([_token(word) for word in self._words(list(tokens))])
        return self._known[key]

    def _words(self, tokens: list[Any]) -> Sequence[str]:
        if all(isinstance(token, str) for token in tokens):
            return tokens
        if isinstance(self.tokens, list | tuple) and len(self.tokens) == len(tokens):
            return [str(word) for word in self.tokens]
        return words(None if isinstance(self.tokens, list | tuple) else self.tokens, tokens)

    def listed(self) -> list[Json]:
        """Return the sites as the page names them."""
        kinds = {site.rpartition(".")[0] for site in self.sites}
        return [
            {
                "alias": safe(s),
                "name": _name(s),
                "short": safe(_short(s, len(kinds) > 1)),
                "heads": self.heads[r],
                "labels": self.kept[s].labels() if s in self.kept else None,
            }
            for s, r in self.sites.items()
        ]


def _name(site: str) -> str:
    from regard.lens.sentences import layer

    name = layer(site)
    return safe(name[:1].upper() + name[1:])


def _short(site: str, several: bool) -> str:
    kind, _, number = site.rpartition(".")
    return f"{kind[:3]} {number}" if several and kind else number


def _token(word: str) -> Json:
    found = pieces(word)
    return found[0] if len(found) == 1 else found


def number(value: Any) -> Any:
    """Return a number to four digits, None for what is none."""
    if isinstance(value, bool) or value is None:
        return value
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 1e9 else float(f"{value:.4g}")


def head_map_json(panel: MapPanel, section: int, places: Places) -> Json:
    """Return a map of heads, its lines in the order of the page's sites (filled in by `spread`)."""
    sites = [str(site) for site in panel.sites or ()]
    rows = [places.row(site, 0 if site in places.kept else len(panel.columns)) for site in sites]
    grids = [(name, panel.signed(name), grid) for name, grid in panel.values.items()]
    return {
        "section": section, "title": safe(panel.title), "note": safe(panel.note), "rows": rows,
        "quantities": [
            {
                "name": safe(n), "signed": s,
                "values": [places.line(site, line) for site, line in zip(sites, _grid(g), strict=True)],
            }
            for n, s, g in grids
        ],
    }  # fmt: skip


def spread(maps: Iterable[Json], rows: int) -> list[Json]:
    """Bring the lines of every map of heads to the page's rows."""
    out = []
    for found in maps:
        placed = found.pop("rows")
        for quantity in found["quantities"]:
            lines: list[Json] = [[] for _ in range(rows)]
            for row, line in zip(placed, quantity["values"], strict=True):
                lines[row] = line
            quantity["values"] = lines
        out.append(found)
    return out


def panel_json(panel: Panel, section: int, places: Places) -> Json:
    """Return a panel of its own on the page."""
    about: dict[str, Json] = {"section": section, "title": safe(panel.title), "note": safe(panel.note)}  # type: ignore[union-attr]
    if isinstance(panel, MapPanel):
        quantities = [
            {"name": safe(n), "signed": panel.signed(n), "values": _grid(g)} for n, g in panel.values.items()
        ]
        labels = {
            "rows": [_token(str(r)) for r in panel.rows],
            "columns": [_token(str(c)) for c in panel.columns],
        }
        return {**about, "type": "map", **labels, "quantities": quantities}
    if isinstance(panel, TablePanel):
        heads = None if panel.heads is None else [h and places.head(h) for h in panel.heads]
        rows = [[_cell(v) for v in row.values()] for row in panel.table.rows()]
        columns = [safe(name) for name in panel.table.columns]
        return {**about, "type": "table", "columns": columns, "rows": rows, "heads": heads}
    if isinstance(panel, LinePanel):
        lines = {safe(name): [number(v) for v in values] for name, values in panel.lines.items()}
        x = [safe(str(label)) for label in panel.x]
        axes = {"x_label": safe(panel.x_label), "y_label": safe(panel.y_label)}
        return {**about, "type": "line", "x": x, "lines": lines, "log": panel.log, **axes}
    assert isinstance(panel, GraphPanel)
    nodes = [
        {"name": safe(n.name), "column": n.column, "label": safe(n.label or n.name),
         "head": n.head and places.head(n.head)}
        for n in panel.nodes
    ]  # fmt: skip
    links = [
        {"source": safe(x.source), "target": safe(x.target), "weight": number(x.weight) or 0}
        for x in panel.links
    ]
    return {**about, "type": "graph", "nodes": nodes, "links": links}


def pattern_json(panel: PatternPanel, section: int, places: Places) -> Json:
    """Return one head's pattern."""
    from regard.report.pack import pack

    kind = "pooled" if panel.width > 1 else "exact"
    packed = pack(panel.site, panel.head, panel.weights, kind, panel.width).as_json()
    shape = panel.weights.shape
    rows, columns = (
        size * panel.width if tokens is None else len(tokens)
        for size, tokens in zip(shape, (panel.queries, panel.keys), strict=True)
    )
    row, head = places.head((panel.site, panel.head))
    return {
        **packed, "row": row, "head": head, "section": section, "rows": rows, "columns": columns,
        "queries": places.text(panel.queries), "keys": places.text(panel.keys),
    }  # fmt: skip


def _grid(grid: Any) -> Json:
    return [[number(v) for v in line] for line in np.asarray(grid)]


def _cell(value: Any) -> Json:
    return number(value) if isinstance(value, int | float) or value is None else safe(str(value))
