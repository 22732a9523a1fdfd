"""What does steering cost in decoding? Steps of one token under edits of some heads, against plain steps.

A session is opened before and closed after every series of steps, so that all cases take turns. Seconds are
those of the processor, on one thread, so that other processes count little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import regard
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import load, same, text_ids
from benchmarks.timing import interleaved
from regard.edit import ACT, EditWeights, ForceAttention, ScaleHeads, ScoreBias
from regard.runtime import Edit

BOUND = 1.3
LENGTHS, STEPS, HEADS = (512, 4096), 6, 3
Opens = Callable[[], AbstractContextManager[Any]]


def edits_of(layers: list[int], heads: list[int]) -> dict[str, Edit]:
    """Return one edit of each kind, of the same heads in each of some layers."""
    named = [(layer, head) for layer in layers for head in heads]
    return {
        "scale-heads": ScaleHeads(heads=named, factor=0.5),
        "edit-weights": EditWeights(_halved, layers, heads),
        "force-attention": ForceAttention(named, to="previous", strength=0.5),
        "score-bias": ScoreBias(-1.0, layers=layers, heads=heads, positions=[0]),
        "act": ACT(named),
    }


def _halved(weights: Tensor, block: Any) -> Tensor:
    return weights * 0.5


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length and edit; the first of each length is a session that looks at nothing."""
    torch.set_num_threads(1)
    model, tokenizer = load()
    lengths = [32] if options.quick else list(options.lengths or LENGTHS)
    rounds = options.rounds or (1 if options.quick else 7)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        rows += _rows(model, text_ids(tokenizer, length + STEPS), rounds)
    return rows


def _rows(model: Any, ids: Tensor, rounds: int) -> Rows:
    layers = list(range(model.config.num_hidden_layers))
    opens: dict[str, Opens] = {"no edit, no lens": lambda: regard.watch(model)}
    for where, chosen in (("1 layer", [len(layers) // 2]), (f"all {len(layers)} layers", layers)):
        for name, edit in edits_of(chosen, list(range(HEADS))).items():
            opens[f"{name}, {HEADS} heads of {where}"] = _opening(model, edit)
    cache = _filled(model, ids, nullcontext())
    plain, _ = _steps(model, ids, cache)
    _check(model, ids, opens, plain)
    cases = {"plain": _timed(model, ids, cache, nullcontext)}
    cases |= {name: _timed(model, ids, cache, open_) for name, open_ in opens.items()}
    times = interleaved(cases, rounds, extra=0)
    length = ids.shape[1] - STEPS
    return [
        {
            "case": f"{name}; {length} cached",
            "plain_ms": 1e3 * times.median("plain") / STEPS,
            "edited_ms": 1e3 * times.median(name) / STEPS,
            "ratio": times.ratio(name, "plain"),
            "ratios": "{:.2f} - {:.2f}".format(*times.spread(name, "plain")),
            "bound": BOUND if "1 layer" in name else None,
            "rounds": rounds,
            "times": times.as_json() if number == 0 else None,
        }
        for number, name in enumerate(opens)
    ]


def _opening(model: Any, edit: Edit) -> Opens:
    return lambda: regard.steer(model, edit)


def _filled(model: Any, ids: Tensor, session: AbstractContextManager[Any]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with session:
        model(ids[:, :-STEPS], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _steps(model: Any, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, float]:
    """Feed the last tokens one by one; the last logits and the seconds. The cache is then as it was."""
    start = time.thread_time()
    for place in range(ids.shape[1] - STEPS, ids.shape[1]):
        logits = model(ids[:, place, None], past_key_values=cache, use_cache=True).logits
    seconds = time.thread_time() - start
    cache.crop(-STEPS)
    return logits[:, -1], seconds


def _timed(model: Any, ids: Tensor, cache: DynamicCache, open_: Opens) -> Callable[[], float]:
    def run() -> float:
        with open_():
            _steps(model, ids, cache)
            return _steps(model, ids, cache)[1]

    return run


def _check(model: Any, ids: Tensor, opens: dict[str, Opens], plain: Tensor) -> None:
    """Refuse a session without edits that changes logits, an edit that changes nothing, and halved weights
    that are not halved outputs.

    ACT keeps the sinks that it found while it read the text; fed a filled cache it finds none.
    """
    cache, halved = _filled(model, ids, nullcontext()), dict[str, Tensor]()
    for name, open_ in opens.items():
        with open_():
            found, _ = _steps(model, ids, cache)
        idle = name.startswith("no edit")
        if idle:
            same(found, plain, name)
        elif torch.equal(found, plain) and not name.startswith("act"):
            raise WrongResult(f"{name}: logits did not change.")
        kind, _, where = name.partition(",")
        if kind in ("scale-heads", "edit-weights"):
            same(found, halved.setdefault(where, found), name)


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="cached tokens (default: 512 4096)")
    return answer("steering", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
