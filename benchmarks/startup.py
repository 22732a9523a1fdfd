"""How long until something is seen? `regard --help`, and `regard inspect` of the cached default model."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import load
from benchmarks.timing import interleaved

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "numpy")
TOKENS = 256


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a command; a bare Python stands beside them."""
    tokenizer = load()[1]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(_text(tokenizer))
        return _rows(options, text)


def _rows(options: argparse.Namespace, text: Path) -> Rows:
    commands = {
        "python -c pass": (["-c", "pass"], "", None),
        "regard --help": (["-m", "regard.cli", "--help"], "inspect", 0.5),
        f"regard inspect, {TOKENS} tokens": (
            ["-m", "regard.cli", "inspect", "--text", str(text)], f"({TOKENS} tokens)", 15.0,
        ),
    }  # fmt: skip
    _check_light()
    rows = []
    for name, (arguments, expected, bound) in commands.items():
        rounds = options.rounds or (1 if options.quick else 5 if "inspect," in name else 11)
        times = interleaved({name: lambda a=arguments, e=expected: _run(a, e)}, rounds)
        rows.append(
            {
                "case": name,
                "seconds": times.median(name),
                "bound": bound,
                "rounds": rounds,
                "dropped": times.dropped,
                "times": times.as_json(),
            }
        )
    return rows


def _text(tokenizer: Any) -> str:
    """Return a text of as many tokens as asked for."""
    from benchmarks.subject import text_ids

    text: str = tokenizer.decode(text_ids(tokenizer, TOKENS)[0])
    found = len(tokenizer(text).input_ids)
    if found != TOKENS:
        raise WrongResult(f"the text for `regard inspect` has {found} tokens, not {TOKENS}.")
    return text


def _run(arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=_environment(), check=False
    )
    if done.returncode or expected not in done.stdout:
        raise WrongResult(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")


def _check_light() -> None:
    """Refuse a help that loads torch."""
    code = f"""
import contextlib, io, sys, regard.cli
with contextlib.redirect_stdout(io.StringIO()):
    regard.cli.main(['--help'])
print([name for name in {HEAVY!r} if name in sys.modules])"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=False
    )
    if done.stdout.strip() != "[]":
        raise WrongResult(f"`regard --help` loads {done.stdout.strip() or done.stderr.strip()}.")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    return answer("startup", parser(__doc__).parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
