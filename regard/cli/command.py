"""Parsing of the command line; each subcommand stands in a file of its own and is imported when used."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {"inspect": "look at what the attention of a model does on a text"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `regard` command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        0, or 2 for a caller's mistake, of which one sentence is then written to standard error.
    """
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        module = importlib.import_module(f"regard.cli.{words[0]}")
        parser = module.parser()
        words = words[1:]
    try:
        options = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    return _reported(options)


def _reported(options: argparse.Namespace) -> int:
    from regard.errors import RegardError

    try:
        return int(options.run(options) or 0)
    except RegardError as error:
        print(f"regard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("regard: interrupted; nothing was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _parser() -> argparse.ArgumentParser:
    from regard import __version__

    parser = argparse.ArgumentParser(
        prog="regard",
        description="Look inside the attention of pretrained models.",
        epilog="`regard COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"regard {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    return parser
