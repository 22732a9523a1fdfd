"""What does watching cost? A forward under all built-in lenses against the same forward with plain SDPA."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.checks import check_lenses, check_logits
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import every_lens, forward, load, seconds_of_matrices, text_ids, watched, weights_in
from benchmarks.timing import interleaved

BOUNDS = {512: 1.15, 2048: 1.3, 8192: 1.5}
ROUNDS = {512: 15, 2048: 7, 8192: 3}


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length."""
    model, tokenizer = load()
    lengths = options.lengths or ([64] if options.quick else list(BOUNDS))
    check_lenses(model, text_ids(tokenizer, 64 if options.quick else 256))
    return [_row(model, text_ids(tokenizer, n), options, floor) for n in lengths]


def _row(model: Any, ids: Any, options: argparse.Namespace, floor: dict[str, float]) -> dict[str, Any]:
    length = ids.shape[1]
    check_logits(model, ids)
    cases = {
        "plain": lambda: forward(model, ids),
        "watched": lambda: watched(model, ids, every_lens()),
    }
    rounds = options.rounds or (2 if options.quick else ROUNDS.get(length, 5))
    times = interleaved(cases, rounds, warm=0)
    low, high = times.spread("watched", "plain")
    matrices = seconds_of_matrices(model, length, floor["matmul"])
    moved = matrices + 8 * weights_in(model, length) / floor["bytes"]
    return {
        "case": length,
        "plain_s": times.median("plain"),
        "watched_s": times.median("watched"),
        "ratio": times.ratio("watched", "plain"),
        "ratios": f"{low:.2f} - {high:.2f}",
        "bound": BOUNDS.get(length),
        "floor_s": matrices,
        "floor_with_weights_s": moved,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens (default: 512 2048 8192)")
    return answer("watch", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
