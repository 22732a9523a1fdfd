"""What memory does watching add? Peaks of fresh processes, plain and under all built-in lenses."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.checks import check_lenses
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import every_lens, forward, load, text_ids, watched

LENGTHS = (512, 2048, 8192)
CASES = ("plain", "watched", "eager")
EAGER_UP_TO = 2048
ALLOWED = 64 * 2**20


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length; the last fields say what one line through them comes to."""
    lengths = options.lengths or ([64] if options.quick else list(LENGTHS))
    rounds = options.rounds or (1 if options.quick else 3)
    model, tokenizer = load()
    check_lenses(model, text_ids(tokenizer, 64))
    return [_row(length, rounds) for length in lengths]


def _row(length: int, rounds: int) -> dict[str, Any]:
    cases = [case for case in CASES if case != "eager" or length <= EAGER_UP_TO]
    peaks = {case: statistics.median(_peak(case, length) for _ in range(rounds)) for case in cases}
    row = {"case": length, **{f"{case}_mb": round(peaks[case] / 2**20) for case in cases}}
    added = peaks["watched"] - peaks["plain"]
    row["added_mb"] = round(added / 2**20)
    row["added_over_64_mb_kb_a_token"] = round(max(0.0, added - ALLOWED) / 2**10 / length, 2)
    return row


def _peak(case: str, length: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", case, "--lengths", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongResult(f"{case} at {length} tokens failed: {done.stderr.strip().splitlines()[-1]}")
    return int(json.loads(done.stdout.splitlines()[-1])["added"])


def one(case: str, length: int) -> None:
    """Run one forward in this process, and print how much its peak is above what the loaded model took."""
    machine.settle()
    model, tokenizer = load()
    ids = text_ids(tokenizer, length)
    forward(model, ids[:, :8])
    if case == "eager":
        model.set_attn_implementation("eager")
    work: dict[str, Callable[[], Any]] = {
        "plain": lambda: forward(model, ids),
        "watched": lambda: watched(model, ids, every_lens()),
        "eager": lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1, output_attentions=True),
    }
    before = _resident()
    kept = work[case]()
    print(json.dumps({"added": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}))
    del kept


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens (default: 512 2048 8192)")
    options.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.one:
        one(chosen.one, chosen.lengths[0])
        return 0
    return answer("memory", chosen, ask)


if __name__ == "__main__":
    sys.exit(main())
