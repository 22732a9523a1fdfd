"""What do swapped-in mechanisms cost? A window and linear attention against the model's own attention."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import forward, load, same, text_ids
from benchmarks.timing import Times, interleaved
from regard.attention import LinearAttention, SlidingWindow

LENGTHS, WINDOW = (2048, 8192), 256
BEFORE, STEPS = (512, 4096), 16


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row a length for the window, and a row a length of the past for decoding."""
    model, tokenizer = load()
    lengths = options.lengths if options.lengths is not None else ([96] if options.quick else LENGTHS)
    befores = options.before if options.before is not None else ([64] if options.quick else BEFORE)
    _check_window(model, text_ids(tokenizer, 96))
    _check_decoding(model, text_ids(tokenizer, 24))
    rows = [_window(model, text_ids(tokenizer, n), options) for n in lengths]
    return [*rows, *(_decoding(model, text_ids(tokenizer, n), options) for n in befores)]


def _row(case: str, times: Times, base: str, other: str, unit: float = 1.0) -> dict[str, Any]:
    low, high = times.spread(other, base)
    return {
        "case": case,
        f"{base}_s": times.median(base) / unit,
        f"{other}_s": times.median(other) / unit,
        "ratio": times.ratio(other, base),
        "ratios": f"{low:.2f} - {high:.2f}",
        "rounds": len(times.seconds[base]),
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _window(model: Any, ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    def swapped() -> Tensor:
        with regard.swap(model, SlidingWindow(WINDOW)):
            return forward(model, ids)

    rounds = options.rounds or (2 if options.quick else 3 if ids.shape[1] > 4096 else 5)
    times = interleaved({"plain": lambda: forward(model, ids), "swapped": swapped}, rounds, warm=0)
    return _row(f"SlidingWindow({WINDOW}), {ids.shape[1]} tokens", times, "plain", "swapped")


def _decoding(model: Any, ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    def linear() -> float:
        with regard.swap(model, LinearAttention()):
            return _decode(model, ids)

    cases: dict[str, Callable[[], Any]] = {"cache": lambda: _decode(model, ids), "state": linear}
    times = interleaved(cases, options.rounds or (2 if options.quick else 5), warm=0)
    return _row(f"LinearAttention, a token after {ids.shape[1]}", times, "cache", "state")


def _decode(model: Any, ids: Tensor) -> float:
    """Return the median seconds of a decoded token after `ids`; the first one is not counted."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for _ in range(STEPS):
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _check_window(model: Any, ids: Tensor) -> None:
    """Refuse a window that is not the same as a mask given from outside."""
    length, window = ids.shape[1], 8
    row, key = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = ((key <= row) & (row - key < window))[None, None]
    with regard.swap(model, SlidingWindow(window)):
        found = forward(model, ids)
    same(found, forward(model, ids, attention_mask=mask), "SlidingWindow")
    if torch.equal(found, forward(model, ids)):
        raise WrongResult("SlidingWindow: it changed nothing.")


def _check_decoding(model: Any, ids: Tensor) -> None:
    """Refuse a decoding from the state that is not what recomputing gives."""
    with regard.swap(model, LinearAttention()):
        whole = forward(model, ids)
        out = model(input_ids=ids[:, :-2], use_cache=True)
        for token in (ids[:, -2:-1], ids[:, -1:]):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    same(out.logits[:, -1], whole, "LinearAttention, decoding")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="*", help="tokens in the window's text")
    options.add_argument("--before", type=int, nargs="*", help="tokens before those decoded")
    return answer("swap", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
