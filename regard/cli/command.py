"""Parsing of the command line; each subcommand stands in a file of its own and is imported when used."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "inspect": "look at what the attention of a model does on a text",
    "study": "test a paper's claim small, and say whether it held",
    "papers": "list the published systems in scope, and which of them work today",
    "run": "run a system's own command",
}


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"regard: {message}; see `{self.prog} --help`.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `regard` command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        0; 2 for a caller's mistake, of which one sentence is then written to standard error; 130 where
        it was interrupted.
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
        print("regard: interrupted.", file=sys.stderr)
        return 130


def say(text: str) -> None:
    """Write to standard output, at once; a reader who has gone is no error.

    What its encoding cannot hold is written as `?`.

    Raises:
        RegardError: where it cannot be written to, as on a full disk.
    """
    from regard.errors import RegardError

    if sys.stdout is None:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        raise RegardError(f"Standard output cannot be written to: {error.strerror or error}.") from error


def _discard_output() -> None:
    """Point standard output at nothing, so that Python does not fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def _parser() -> argparse.ArgumentParser:
    from regard import __version__

    parser = Parser(
        prog="regard",
        description="Look inside the attention of pretrained models.",
        epilog="`regard COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"regard {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    return parser
