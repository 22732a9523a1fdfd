"""Pictures of a head table: a heat map for files, and a small grid for notebooks."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError
from regard.runtime.table import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.runtime.head_table import HeadTable

Grid = npt.NDArray[np.float64]
MOST_CELLS = 12_000
LIGHT, DARK = (247, 251, 255), (8, 69, 148)
NEGATIVE = (178, 58, 38)


def draw(table: HeadTable, column: str, path: str | Path | None = None) -> Figure:
    """Draw one column, a panel a kind of site, on one colour scale; see `HeadTable.plot`.

    The figure is taken out of pyplot's list, so that a notebook shows it once.
    """
    try:
        from matplotlib import pyplot
    except ImportError as missing:
        raise RegardError('plot() needs matplotlib; run `pip install "regard[plot]"`.') from missing
    grids = {kind: table.grid(column, kind) for kind in table.kinds}
    low, high = scale(table[column])
    widths = [max(2.2, 0.24 * grid.shape[1]) for grid in grids.values()]
    tallest = max(grid.shape[0] for grid in grids.values())
    size = (min(sum(widths) + 2.2, 40.0), min(max(2.6, 0.2 * tallest + 1.4), 40.0))
    figure = pyplot.figure(figsize=size, layout="constrained", facecolor="white")
    pyplot.close(figure)
    axes = figure.subplots(1, len(grids), squeeze=False, width_ratios=widths)[0]
    for axis, (kind, grid) in zip(axes, grids.items(), strict=True):
        image = axis.imshow(
            np.ma.masked_invalid(grid),
            cmap="RdBu" if low < 0 else "Blues",
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_facecolor("#c8c8c8")
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.spines[:].set_visible(False)
        if len(grids) > 1:
            axis.set_title(kind, fontsize=9, color="#444444")
    figure.colorbar(image, ax=list(axes), shrink=0.9, label=column.replace("_", " "))
    figure.suptitle(heading(table, column), fontsize=10)
    if path is not None:
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as failure:
            raise RegardError(f"cannot write {path}: {failure}.") from failure
    return figure


def as_html(table: HeadTable) -> str:
    """Return a coloured grid a column, the first one open; no script, no outside resource."""
    parts = [f"<p><b>{html.escape(heading(table, None))}</b></p>"]
    definition = table.about.get("definition")
    if definition:
        parts.append(f"<p>{html.escape(str(definition))}</p>")
    cells = 0
    for number, column in enumerate(table.columns):
        cells += len(table)
        if number and cells > MOST_CELLS:
            left = ", ".join(list(table.columns)[number:])
            parts.append(f"<p>not drawn, for length: {html.escape(left)}</p>")
            break
        low, high = scale(table[column])
        body = "".join(
            (f"<div>{html.escape(kind)}</div>" if len(table.kinds) > 1 else "")
            + grid_html(table.grid(column, kind), low, high)
            for kind in table.kinds
        )
        title = f"{html.escape(column)} ({shown(low)} to {shown(high)})"
        opened = "" if number else " open"
        parts.append(f"<details{opened}><summary>{title}</summary>{body}</details>")
    return f'<div style="font-size:11px;line-height:1.2">{"".join(parts)}</div>'


def grid_html(grid: Grid, low: float, high: float) -> str:
    """Return one grid, layers down and heads across, as an HTML table; a cell tells its value."""
    size = "width:13px;height:9px;padding:0;border:1px solid #fff;"
    rows = []
    for layer, values in enumerate(grid):
        cells = "".join(
            f'<td style="{size}background:{colour(float(value), low, high)}" '
            f'title="layer {layer}, head {head}: {shown(float(value))}"></td>'
            for head, value in enumerate(values)
        )
        label = f'<th style="padding:0 4px;text-align:right;font-weight:normal">{layer}</th>'
        rows.append(f"<tr>{label}{cells}</tr>")
    return f'<table style="border-collapse:collapse;margin:2px 0">{"".join(rows)}</table>'


def scale(values: Grid) -> tuple[float, float]:
    """Return the ends of the colour scale: from 0, or symmetric where some are negative."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    if low < 0:
        high = max(-low, high)
        return -high, high
    return 0.0, high or 1.0


def colour(value: float, low: float, high: float) -> str:
    """Return the colour of a value: white to blue, negatives to red, grey where not observed."""
    if not np.isfinite(value):
        return "#c8c8c8"
    end = NEGATIVE if value < 0 else DARK
    share = min(1.0, abs(value) / (abs(low) if value < 0 else high))
    mixed = (round(a + (b - a) * share) for a, b in zip(LIGHT, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def heading(table: HeadTable, column: str | None) -> str:
    """Return a title from what is known of the table: column, lens, model."""
    about = table.about
    what = column.replace("_", " ") if column else str(about.get("lens", "head table"))
    where = about.get("model")
    return f"{what}, {where}" if where else what
