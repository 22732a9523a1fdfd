"""A layers x heads map as text: numbers where they fit the width, else shades, heads in bands if need be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.text import Text

SHADES = " ░▒▓█"
PLAIN_SHADES = " .:*#"
LABEL = 7
MARK = 10

Values = npt.NDArray[np.float64]


def grid(values: Values, *, percent: bool, width: int | None, shades: str = SHADES) -> Iterator[Text]:
    """Yield the lines of a map.

    Args:
        values: [layers, heads]; a layer with no finite value is left out.
        percent: values are shares of one, told in per cent.
        width: columns there are; None for any number, and then all is told in numbers.
        shades: from the lowest value to the highest.
    """
    low, high = (0.0, 1.0) if percent else _range(values)
    cells = _numbers(values, percent)
    size = 1 + max(len(f"h{values.shape[1] - 1}"), *(len(cell) for row in cells for cell in row))
    numeric = width is None or LABEL + size * values.shape[1] <= width
    if not numeric:
        cells = [[_shade(v, low, high, shades) for v in row] for row in values]
        size = 1
    band = values.shape[1] if width is None else max(1, (width - LABEL) // size)
    for start in range(0, values.shape[1], band):
        heads = range(start, min(start + band, values.shape[1]))
        yield _header(heads, size)
        for layer, row in enumerate(values):
            if np.isfinite(row).any():
                shown = ((cells[layer][h].rjust(size), _style(row[h], low, high)) for h in heads)
                yield _line(f"{layer:>{LABEL - 1}} ", shown)
    if not numeric:
        yield _legend(low, high, percent, shades)


def _range(values: Values) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def _numbers(values: Values, percent: bool) -> list[list[str]]:
    """Every value with as many decimals as the largest needs for about three digits."""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    if percent:
        digits, scale = 0, 100.0
    else:
        digits = 1 if largest == 0 else min(6, max(0, 2 - math.floor(math.log10(largest))))
        scale = 1.0
    return [[f"{v * scale:.{digits}f}" if math.isfinite(v) else "-" for v in row] for row in values]


def _shade(value: float, low: float, high: float, shades: str) -> str:
    if not math.isfinite(value):
        return "-"
    return shades[min(len(shades) - 1, int(_share(value, low, high) * len(shades)))]


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def _style(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "dim"
    share = _share(value, low, high)
    level = round(share * 215)
    ink = "255,255,255" if share > 0.55 else "20,20,30"
    return f"rgb({ink}) on rgb({250 - level},{250 - level // 2},255)"


def _header(heads: range, size: int) -> Text:
    """Numbers above the columns; where columns are of one character, above every tenth."""
    from rich.text import Text

    if size > 1:
        marks = "".join(f"h{head}".rjust(size) for head in heads)
    else:
        marks = "".join(f"{f'h{head}':<{MARK}}" for head in heads if head % MARK == 0 or head == heads[0])
        if heads[0] % MARK:
            marks = f"{f'h{heads[0]}':<{MARK - heads[0] % MARK}}" + marks[MARK:]
        marks = marks.rstrip()
    return Text(f"{'layer':>{LABEL - 1}} {marks}", "dim")


def _line(label: str, cells: Iterator[tuple[str, str]]) -> Text:
    from rich.text import Text

    return Text.assemble((label, "dim"), *cells)


def _legend(low: float, high: float, percent: bool, shades: str) -> Text:
    from rich.text import Text

    steps = [low + (high - low) * i / len(shades) for i in range(len(shades) + 1)]
    told = [f"{step * 100:.0f}" if percent else f"{step:.3g}" for step in steps]
    ranges = ", ".join(f"'{shade}' {told[i]}-{told[i + 1]}" for i, shade in enumerate(shades))
    return Text(f"{' ' * LABEL}{ranges}", "dim")
