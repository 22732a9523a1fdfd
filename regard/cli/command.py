"""Parsing of the command line; each subcommand stands in a file of its own and is imported when used."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from regard.errors import RegardError

COMMANDS = {
    "inspect": "look at what the attention of a model does on a text",
    "heads": "rank heads by what they do (retrieval, induction, sinks, ...), and keep the list to steer with",
    "diff": "say which heads of two models, or of one under an edit, do something else",
    "lm-eval": "run the evaluation harness on a model, steered or with other attention",
    "study": "test a paper's claim small, and say whether it held",
    "mechanisms": "list what can stand in the place of softmax attention, and what each costs",
    "train": "train a tiny language model with any mechanism, or a classifier of images or texts",
    "models": "list the image models that can be trained, with their parameters and operations",
    "papers": "list the published systems in scope, and which of them work today",
    "run": "run a system's own command",
}
TRAINED = "regard-train"
"""The folder that `regard train` writes to, unless told another."""


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"regard: {message}; see `{self.prog} --help`.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stderr:
            complain(message.removeprefix("regard: "))
        else:
            say(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `regard` command.

    Args:
        argv: the arguments after the program's name; default those of the process.

    Returns:
        0; 2 for a caller's mistake, of which one sentence is then written to standard error; 130 where
        it was interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _ending_tidily():
            return _run(words)
    except RegardError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("interrupted.")
        return 130


def _run(words: list[str]) -> int:
    parser = _parser()
    if words and words[0] in COMMANDS:
        parser = importlib.import_module(f"regard.cli.{words[0].replace('-', '_')}").parser()
        words = words[1:]
    try:
        options = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    return int(options.run(options) or 0)


@contextlib.contextmanager
def _ending_tidily() -> Iterator[None]:
    """Leave by way of every `finally` when the process is asked to end, so that nothing is half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Write to standard output, at once; a reader who has gone is no error.

    What its encoding cannot hold is written as `?`.

    Raises:
        RegardError: where it cannot be written to, as on a full disk.
    """
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


def complain(text: str) -> None:
    """Write one line to standard error, after the program's name; where there is none, nothing."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"regard: {' '.join(text.split())}", file=sys.stderr, flush=True)


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
