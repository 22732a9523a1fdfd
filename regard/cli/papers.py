"""`regard papers`: the published systems in scope, and which of them work today."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

from regard.cli.command import Parser, say
from regard.errors import RegardError
from regard.papers import AREAS, STATES, Paper, about, counted, find, papers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 80
STYLES = {"works": "bold green", "partly": "yellow", "planned": "dim"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(prog="regard papers", description=__doc__)
    parser.add_argument(
        "system", nargs="*", metavar="SYSTEM", help="show one in full: its slug, number, or part of its title"
    )
    parser.add_argument("--about", metavar="WORDS", help="those about some words, the best match first")
    parser.add_argument("--state", choices=STATES, help="those in this state")
    parser.add_argument("--area", metavar="AREA", help=f"those of one area: {', '.join(AREAS)}")
    parser.add_argument("--json", metavar="FILE|-", help="write all fields as JSON; - is standard output")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the catalogue, a part of it, or one system."""
    path = None
    if options.json not in (None, "-"):
        from regard.cli import given

        path, _ = given.check_outputs(options.json, None)
    name = " ".join(options.system)
    if name and (options.about is not None or options.state or options.area):
        raise RegardError(
            f"Give a system ({name!r}) or a choice of them (--about, --state, --area), not both."
        )
    chosen = [find(name)] if options.system else _chosen(options)
    rows = [paper.row() for paper in chosen]
    text = json.dumps(rows[0] if options.system else rows, indent=1, ensure_ascii=False) + "\n"
    if options.json == "-":
        say(text)
        return 0
    say(_printed(chosen, options))
    if path is not None:
        from regard.runtime.table import write_text

        write_text(path, text)
    return 0


def _chosen(options: argparse.Namespace) -> list[Paper]:
    rows = list(papers().values()) if options.about is None else about(options.about)
    if options.area is not None:
        area = _area(options.area)
        rows = [paper for paper in rows if paper.area == area]
    return [paper for paper in rows if options.state in (None, paper.state)]


def _area(given: str) -> str:
    """Return the area whose folder was given, or a part of the name."""
    words = given.strip().lower()
    texts = {area: f"{area} {heading}" for area, heading in AREAS.items()}
    found = [words] if words in AREAS else [area for area, text in texts.items() if words and words in text]
    if len(found) != 1:
        count = f"{len(found)} areas" if found else "no area"
        raise RegardError(f"--area: {given!r} names {count}; they are {', '.join(AREAS)}.")
    return found[0]


def _printed(chosen: list[Paper], options: argparse.Namespace) -> str:
    """The text for the terminal, with colour only where standard output is one."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
    console = Console(width=width, highlight=False)
    with console.capture() as shown:
        if options.system:
            _print_one(console, chosen[0])
        elif options.about is not None:
            _print_found(console, chosen)
        else:
            _print_areas(console, chosen)
    return "\n".join(line.rstrip() for line in shown.get().splitlines()) + "\n"


def _print_areas(console: Console, chosen: list[Paper]) -> None:
    from rich.text import Text

    for area, heading in AREAS.items():
        rows = [paper for paper in chosen if paper.area == area]
        if not rows:
            continue
        console.print(Text.assemble((heading.capitalize(), "bold"), (f"  regard/{area}/", "dim")))
        slug = max(len(paper.slug) for paper in rows)
        for paper in rows:
            console.print(_line(paper, slug, console.width), soft_wrap=True)
        console.print()
    total = len(papers())
    heading = f"{total} systems" if len(chosen) == total else f"{len(chosen)} of {total} systems"
    console.print(f"{heading}: {counted(chosen)}." if chosen else f"{heading}.")
    console.print("`regard papers SLUG` shows one in full; --about WORDS searches.")


def _line(paper: Paper, slug: int, width: int) -> Text:
    """One system on one line: number, state, slug, and as much of the title as there is room for."""
    from rich.text import Text

    line = Text.assemble(
        f"{paper.number:3}  ", (f"{paper.state:7}", STYLES[paper.state]), f"  {paper.slug:{slug}}  "
    )
    title = Text(paper.title, "dim")
    title.truncate(width - len(line), overflow="ellipsis")
    return line + title


def _print_found(console: Console, chosen: list[Paper]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for paper in chosen:
        console.print(
            Text.assemble(
                f"{paper.number:3}  ", (f"{paper.state:7}", STYLES[paper.state]), "  ", (paper.slug, "bold")
            )
        )
        console.print(Padding(Text(paper.gives, style="dim"), (0, 0, 0, 5)))
    nothing = "None of those about it is in that state and area."
    console.print(f"{len(chosen)} found: {counted(chosen)}." if chosen else nothing)


def _print_one(console: Console, paper: Paper) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(paper.title, "bold"))
    console.print(Text(paper.cited))
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _details(paper):
        table.add_row(name, Text(value, STYLES[paper.state] if name == "state" else ""))
    console.print(table)


def _details(paper: Paper) -> list[tuple[str, str]]:
    """What `regard papers SLUG` says, line by line."""
    lines: list[tuple[str, Any]] = [
        ("system", f"{paper.slug} (number {paper.number})"),
        ("gives", paper.gives),
        ("area", f"{AREAS[paper.area]} (regard/{paper.area}/); {paper.kind}"),
        ("state", f"{paper.state}: {STATES[paper.state]}"),
        ("missing", paper.missing),
        ("paper", paper.link or "not known"),
        ("code", "\n".join(paper.code)),
        ("run", paper.command and f"regard run {paper.slug} --help"),
        ("study", paper.study and f"regard study {paper.study}"),
        ("tests", paper.tests and f"pytest {' '.join(paper.tests)}"),
        ("read", paper.state != "planned" and f"docs/systems/{paper.slug}.md"),
        ("keywords", ", ".join(paper.keywords)),
    ]
    return [(name, value) for name, value in lines if value]
