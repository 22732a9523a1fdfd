"""A small table of results: plain columns that print, render in a notebook and write to files."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.errors import RegardError, ShapeMismatch

NOTEBOOK_ROWS = 200


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of equal length.

    Attributes:
        columns: name -> values; anything that iterates, tensors and arrays included. Kept as lists
            of plain Python values.
        title: printed above the table, or None.

    Raises:
        ShapeMismatch: where two columns differ in length.

    Example:
        >>> print(Table({"layer": [0, 1], "sinks": [0.25, 0.5]}))
         layer   sinks
        ───────────────
             0   0.250
             1   0.500
    """

    columns: Mapping[str, Any]
    title: str | None = None

    def __post_init__(self) -> None:
        plain = {str(name): _plain(values) for name, values in self.columns.items()}
        lengths = {name: len(values) for name, values in plain.items()}
        if len(set(lengths.values())) > 1:
            raise ShapeMismatch(f"columns of a table are of one length; these are of {lengths}.")
        object.__setattr__(self, "columns", plain)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, column: str) -> list[Any]:
        """Return one column as a list."""
        if column not in self.columns:
            raise RegardError(f"no column {column!r}; the table has {', '.join(self.columns)}.")
        return list(self.columns[column])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each row as a dict, column name -> value."""
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def __str__(self) -> str:
        """Render as text, without colour, as wide as it needs to be."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as Rendered
        from rich.text import Text

        rendered = Rendered(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True, title=self.title)
        for name, values in self.columns.items():
            side = "right" if all(isinstance(v, int | float) for v in values) else "left"
            rendered.add_column(Text(name), justify=side, no_wrap=True)  # type: ignore[arg-type]
        for values in zip(*self.columns.values(), strict=True):
            rendered.add_row(*(Text(shown(value)) for value in values))
        out = io.StringIO()
        Console(file=out, width=10_000, color_system=None, legacy_windows=False).print(rendered)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = []
        for number, row in enumerate(self.rows()):
            if number == NOTEBOOK_ROWS:
                more = f"… {len(self) - number} more rows"
                body.append(f'<tr><td colspan="{len(self.columns)}">{more}</td></tr>')
                break
            cells = "".join(f"<td>{html.escape(shown(value))}</td>" for value in row.values())
            body.append(f"<tr>{cells}</tr>")
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return comma-separated values with a header, NaN left empty; written too, given `path`."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for values in zip(*self.columns.values(), strict=True):
            writer.writerow(["" if _is_nan(value) else value for value in values])
        if path is not None:
            write_text(path, out.getvalue())
        return out.getvalue()

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the rows as a JSON list of objects, NaN as null; written too, given `path`."""
        rows = [{name: finite(value) for name, value in row.items()} for row in self.rows()]
        text = json.dumps(rows, indent=1, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`.

        Raises:
            RegardError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as missing:
            raise RegardError("to_pandas() needs pandas; run `pip install pandas`.") from missing
        return pandas.DataFrame(dict(self.columns))


def shown(value: Any) -> str:
    """Return a value as a table shows it: three digits of a fraction, `-` for what is not known."""
    if value is None or _is_nan(value):
        return "-"
    if isinstance(value, float):
        if value.is_integer() and abs(value) >= 1000:
            return f"{value:.0f}"
        return f"{value:.3f}" if abs(value) < 1000 and not 0 < abs(value) < 0.0005 else f"{value:.3g}"
    return str(value)


def finite(value: Any) -> Any:
    """Return `value`, or None where JSON has no word for it: NaN and the infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all.

    Raises:
        RegardError: where the folder is missing or may not be written to.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RegardError: where the folder is missing or may not be written to.
    """
    path = Path(path)
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as failure:
        raise RegardError(f"cannot write {path}: {failure.strerror or failure}.") from failure


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(values: Any) -> list[Any]:
    tolist = getattr(values, "tolist", None)
    return [_scalar(v) for v in (tolist() if callable(tolist) else values)]


def _scalar(value: Any) -> Any:
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
