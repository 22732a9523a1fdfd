"""`regard lm-eval`: EleutherAI's evaluation harness, with our models, steered or with other attention."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from regard.cli.command import Parser, say
from regard.errors import RegardError

OURS = """--model_args of --model regard, with commas between:
  pretrained=default       the model of regard.load(), a folder, a .gguf file or a Hub name
  edits=FILE               edits that regard.save_edits wrote for it
  swap='NAME KEY=VALUE'    a mechanism in place of attention; layers=0-5 says where
  dtype=float32            of the weights

such as: regard lm-eval --model regard --model_args pretrained=default,edits=calm.json --tasks mine
--include_path tasks/"""


class _Passing(Parser):
    """Hands every word on to the harness, whose options they are."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words = list(args or ())
        if not words or words[0] in ("-h", "--help"):
            self.print_help()
            raise SystemExit(0)
        return argparse.Namespace(run=run, words=words)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    return _Passing(
        prog="regard lm-eval", usage="regard lm-eval [run|ls|validate] ARGUMENTS OF lm-eval",
        description=__doc__ + " All arguments are those of the command lm-eval; `regard lm-eval run --help` "
        "lists them.",
        epilog=OURS, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Call the harness' command line, where the model `regard` is registered.

    Raises:
        RegardError: where the harness is not installed, or it refuses the model's arguments.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RegardError('the evaluation harness is not installed; pip install "regard[lm-eval]".')
    from lm_eval.__main__ import cli_evaluate

    from regard.cli import harness  # noqa: F401

    before = sys.argv
    sys.argv = ["lm-eval", *options.words]
    try:
        cli_evaluate()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            say(stop.code + "\n")
            return 1
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
