"""`regard run`: the command of one published system, which stands in that system's own file.

A row of the catalogue names the function, `command = "module:name"`. It is called with a `SystemParser`, adds
the arguments it has, and sets the function to run, which is called with a `Request`:

    def command(parser: SystemParser) -> None:
        \"\"\"What it prints, in one line for `--help`.\"\"\"
        parser.takes("model", "text", "seed")
        parser.add_argument("--eps", type=float, default=0.3)
        parser.set_defaults(run=print_rates)

    def print_rates(request: Request) -> dict[str, Any]:
        ...
        return {"rates": rates}                     # what --json writes

Only the module of the system asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from regard.cli.command import Parser, say
from regard.errors import RegardError
from regard.papers import Paper, find, papers


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="regard run",
        description="Run the command of one published system.",
        epilog="`regard run` alone lists the systems that have one; `regard run SYSTEM --help` tells more.",
    )
    parser.add_argument(
        "system", nargs="?", metavar="SYSTEM", help="its slug or number, as in `regard papers`"
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="what its command takes")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run a system's command, or list the systems that have one."""
    if options.system is None:
        say(_listed())
        return 0
    paper = find(options.system)
    command = _command(paper)
    from regard.cli.request import Request, SystemParser

    parser = SystemParser(prog=f"regard run {paper.slug}", description=_about(command))
    command(parser)
    try:
        given = parser.parse_args(options.rest)
    except SystemExit as stop:
        return int(stop.code or 0)
    Request(paper.slug, given).answer()
    return 0


def _command(paper: Paper) -> Callable[..., Any]:
    if paper.command is None:
        having = ", ".join(p.slug for p in papers().values() if p.command)
        raise RegardError(f"{paper.slug} ({paper.state}) has no command of its own; {having} has.")
    module, name = paper.command.split(":")
    return getattr(importlib.import_module(module), name)


def _about(command: Callable[..., Any]) -> str:
    """The first paragraph of what the system says of its command."""
    return (inspect.getdoc(command) or "").split("\n\n")[0].replace("\n", " ")


def _listed() -> str:
    having = [paper for paper in papers().values() if paper.command]
    slug = max(len(paper.slug) for paper in having)
    lines = [f"  {paper.slug:{slug}}  {paper.cited}" for paper in having]
    count = f"{len(having)} of {len(papers())} systems"
    verb = "has" if len(having) == 1 else "have"
    return "\n".join([f"{count} {verb} a command; `regard run SYSTEM --help` tells more.", "", *lines, ""])
