"""Where results go: printed as a table, kept as JSON, one entry a question."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.errors import WrongResult

Rows = Sequence[dict[str, Any]]


def table(rows: Rows) -> str:
    """Return rows of one kind as a Markdown table, also readable as it stands."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def keep(path: Path, question: str, found: dict[str, Any]) -> None:
    """Write what was found beside the answers to other questions; lines of the same key are replaced."""
    document = json.loads(path.read_text()) if path.is_file() else {}
    old = document.get(question, {})
    rows = {json.dumps(row["case"]): row for row in [*old.get("rows", []), *found["rows"]]}
    document[question] = {**found, "rows": list(rows.values())}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every question has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--quick", action="store_true", help="small and soon; its figures mean little")
    found.add_argument("--rounds", type=int, help="how often each case is timed")
    found.add_argument("--out", type=Path, metavar="FILE", help="keep the figures as JSON, beside others")
    return found


def answer(question: str, options: argparse.Namespace, ask: Callable[..., Rows]) -> int:
    """Ask, print and keep; nothing is printed where a result is wrong.

    Args:
        ask: `ask(options, floor)` returns the rows, each with a `case`.
    """
    machine.settle()
    floor = machine.floor(options.quick)
    try:
        rows = ask(options, floor)
    except WrongResult as wrong:
        print(f"no speed is told: {wrong}", file=sys.stderr)
        return 1
    about = machine.about()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print("floor  " + "  ".join(f"{key} {value / 1e9:.1f} G/s" for key, value in floor.items()))
    print(table([{k: v for k, v in row.items() if k != "times"} for row in rows]))
    if options.out is not None:
        command = " ".join(["python", "-m", f"benchmarks.{question}", *sys.argv[1:]])
        for row in rows:
            row["machine"], row["floor"], row["command"] = about, floor, command
        keep(options.out, question, {"rows": list(rows)})
    return 0
