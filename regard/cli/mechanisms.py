"""`regard mechanisms`: what can stand in the place of softmax attention, and what each costs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from regard.cli.command import Parser, say

if TYPE_CHECKING:
    from regard.attention.costs import Entry

KEY = """\
time and memory are those of one head over T positions, D wide, without gradients; step is one position
decoded, from the cache of keys and values or from a state of its own. With + it has parameters. What stands
in place of attention can be swapped into a pretrained model; a layer comes with projections of its own.
`regard mechanisms NAME` tells more, `regard train --mechanism NAME` trains one.
"""
WHENCE = {"cache": "from keys and values", "state": "from a state of its own", None: "not"}
PLACES = {
    "heads": "swap and MultiHeadAttention, in place of attention",
    "layer": "MultiHeadAttention, as a layer with projections of its own",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(prog="regard mechanisms", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="show one in full")
    parser.add_argument("--json", metavar="FILE|-", help="write all fields as JSON; - is standard output")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the table, or one mechanism."""
    from regard.cli.given import check_outputs

    path, _ = check_outputs(options.json, None)
    from regard.attention import MECHANISMS, get
    from regard.attention.costs import describe

    if options.name is not None and options.name not in MECHANISMS:
        get(options.name)
    names = sorted(MECHANISMS) if options.name is None else [options.name]
    entries = [describe(MECHANISMS[name]) for name in names]
    rows = [entry.to_dict() for entry in entries]
    text = (
        json.dumps(rows if options.name is None else rows[0], indent=1, ensure_ascii=False, default=str)
        + "\n"
    )
    if options.json == "-":
        say(text)
        return 0
    say(_table(entries) if options.name is None else _full(entries[0]))
    if path is not None:
        from regard.runtime.table import write_text

        write_text(path, text)
    return 0


def _table(entries: list[Entry]) -> str:
    from regard.runtime.table import Table

    columns = {
        "mechanism": [entry.name + (" +" if entry.parameters else "") for entry in entries],
        "time": [entry.costs.time if entry.costs else "?" for entry in entries],
        "memory": [entry.costs.memory if entry.costs else "?" for entry in entries],
        "step": [(entry.costs.step_time if entry.costs else "?") or "-" for entry in entries],
        "order": ["both" if len(entry.replaces) == 2 else entry.replaces[0] for entry in entries],
        "decodes": [entry.decodes or "-" for entry in entries],
        "in place of": ["attention" if entry.swaps else "a layer" for entry in entries],
        "use": [_short(entry.use) for entry in entries],
    }
    return f"{Table(columns)}\n\n{KEY}"


def _short(use: str) -> str:
    return "both" if " and " in use else use


def _full(entry: Entry) -> str:
    told = {
        "costs": _costs(entry),
        "order": " or ".join(entry.replaces),
        "stands in": PLACES[entry.kind],
        "honours": ", ".join(("order", *entry.honours)),
        "decodes": WHENCE[entry.decodes],
        "use": entry.use,
        "parameters": "of its own" if entry.parameters else "none",
        "options": ", ".join(_option(n, v) for n, v in entry.options.items()) or "none",
        **{f"excepted: {law}": reason for law, reason in entry.exempt.items()},
    }
    width = max(map(len, told))
    lines = [f"  {name:{width}}  {value}" for name, value in told.items()]
    return "\n".join([f"{entry.name} ({entry.spec})", entry.about, "", *lines, ""])


def _costs(entry: Entry) -> str:
    costs = entry.costs
    if costs is None:
        return "not declared"
    whole = f"time {costs.time}, memory {costs.memory}"
    if costs.step_time is None:
        return whole
    return f"{whole}; one decoded position {costs.step_time}, keeping {costs.step_memory}"


def _option(name: str, default: object) -> str:
    return name if default == "required" else f"{name}={default!r}"
