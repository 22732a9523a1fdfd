"""`regard inspect`: run a model on a text and say what its attention does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from regard.cli import given
from regard.cli.command import Parser
from regard.errors import RegardError

SHADES = " ░▒▓█"
MAP_COLUMN = ("sinks", "first", "attention on the first token, in per cent")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(prog="regard inspect", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder, .gguf file or Hub name")
    parser.add_argument("--text", metavar="FILE|-|WORDS", help="what to read (default: a packaged passage)")
    parser.add_argument("--layers", metavar="0-5,7", help="layers to look at (default: all)")
    parser.add_argument("--lens", action="append", metavar="NAME", help="a measurement; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write one line a head as CSV")
    parser.add_argument("--device", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="such as float32 or bfloat16 (default: float32)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Look at a model and print what was found."""
    text, origin = given.read_text(options.text)
    layers = given.parse_layers(options.layers)
    json_path, csv_path = given.check_outputs(options.json, options.csv)
    from regard.cli.looking import Look, chosen_lenses

    lenses = chosen_lenses(options.lens)
    look = Look.of(options.model, text, origin, layers, options.dtype, options.device)
    main, probe = look.at_text(lenses, layers, options.lens is not None), look.at_probe(lenses, layers)
    _print(look, main, probe)
    if json_path is not None:
        _write_json(json_path, look, main, probe)
    if csv_path is not None:
        _write_csv(csv_path, main, probe)
    return 0


def _print(look: Any, main: dict[str, Any], probe: dict[str, Any]) -> None:
    from rich.console import Console

    from regard.cli.findings import FINDINGS, PROBE_FINDINGS

    console = Console(highlight=False)
    console.print(f"[bold]{look.name}[/bold], {look.size}")
    console.print(f"\n[bold]On {look.origin}[/bold] ({look.tokens} tokens)")
    for name, result in main.items():
        for sentence in FINDINGS.get(name, lambda _: [])(result):
            console.print(f"  {sentence}", soft_wrap=True)
    if probe:
        console.print(f"\n[bold]On {look.probe_words}[/bold]")
    for name, result in probe.items():
        for sentence in PROBE_FINDINGS[name](result):
            console.print(f"  {sentence}", soft_wrap=True)
    shown = _map(main)
    if shown is not None:
        title, table = shown
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table)


def _map(main: dict[str, Any]) -> tuple[str, Any] | None:
    """The layers x heads map of the first quantity there is."""
    from regard.runtime.head_table import HeadTable

    name, column, title = MAP_COLUMN
    if name not in main:
        heads = {n: r for n, r in main.items() if isinstance(r, HeadTable)}
        if not heads:
            return None
        name = next(iter(heads))
        column = next(iter(heads[name].columns))
        title = f"{name}: {column}"
    values = main[name].grid(column)
    percent = column in ("first", "score", "normalised")
    return title if percent else f"{name}: {column}", _grid(values, percent)


def _grid(values: Any, percent: bool) -> Any:
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    low, high = (0.0, 1.0) if percent else (float(np.nanmin(values)), float(np.nanmax(values)))
    table = Table(box=None, padding=0, pad_edge=False, header_style="dim")
    table.add_column("layer ", justify="right", style="dim")
    wide = values.shape[1] <= 20
    for head in range(values.shape[1]):
        table.add_column(f" h{head:<3}" if wide else str(head % 10), justify="right")
    for layer, row in enumerate(values):
        if not np.isfinite(row).any():
            continue
        cells = [_cell(value, low, high, percent, wide) for value in row]
        table.add_row(Text(f"{layer} "), *cells)
    return table


def _cell(value: float, low: float, high: float, percent: bool, wide: bool) -> Any:
    import math

    from rich.text import Text

    if not math.isfinite(value):
        return Text("  -  " if wide else " ")
    share = (value - low) / (high - low) if high > low else 0.0
    level = round(share * 215)
    style = (
        f"rgb({'255,255,255' if share > 0.55 else '20,20,30'}) on rgb({250 - level},{250 - level // 2},255)"
    )
    if not wide:
        return Text(SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))], style=style)
    return Text(f"{value * 100:4.0f} " if percent else f"{value:4.1f} ", style=style)


def _write_json(path: Path, look: Any, main: dict[str, Any], probe: dict[str, Any]) -> None:
    from regard.runtime.table import write_text

    document = {
        "model": look.name,
        "text": {"origin": look.origin, "tokens": look.tokens},
        "probe": look.probe_words if probe else None,
        "on_text": {name: _as_json(result) for name, result in main.items()},
        "on_probe": {name: _as_json(result) for name, result in probe.items()},
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def _as_json(result: Any) -> Any:
    from regard.runtime.table import finite

    about = dict(getattr(result, "about", {}))
    rows = [{k: finite(v) for k, v in row.items()} for row in result.table.rows()]
    return {"about": about, "rows": rows}


def _write_csv(path: Path, main: dict[str, Any], probe: dict[str, Any]) -> None:
    """One line a head; columns are named lens.column, and lens.column@probe."""
    from regard.runtime.head_table import HeadTable
    from regard.runtime.table import Table

    columns: dict[tuple[str, int], dict[str, float]] = {}
    names: list[str] = []
    for suffix, results in (("", main), ("@probe", probe)):
        for lens, result in results.items():
            if not isinstance(result, HeadTable):
                continue
            for column, values in result.columns.items():
                name = f"{lens}.{column}{suffix}"
                names.append(name)
                for head, value in zip(result.names, values, strict=True):
                    columns.setdefault(head, {})[name] = float(value)
    if not columns:
        raise RegardError("--csv: none of the chosen lenses gives numbers per head.")
    heads = list(columns)
    table: dict[str, list[Any]] = {"site": [h[0] for h in heads], "head": [h[1] for h in heads]}
    for name in names:
        table[name] = [columns[head].get(name, float("nan")) for head in heads]
    Table(table).to_csv(path)
