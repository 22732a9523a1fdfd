"""How long does it take to try attention calibration in every head of a model, one at a time?

    python -m benchmarks.calibration

The job: 24 made sentences in one padded batch, ACT in each of all 270 heads by itself. `replay` runs the
blocks from the head's own on, of the heads that have a hidden sink, as `filter_heads` does; beside it the
plain loop, one whole forward a head, timed on a head of every ninth layer and multiplied to all heads. They
must agree on the heads that both try. Where other work takes the processor, `processor`, seconds of it,
says more than `seconds`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import regard
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import load
from regard.edit import ACT
from regard.edit.act import filter_heads
from regard.tasks.sentiment import ANSWERS, sentiment

PROMPTS, EVERY = 24, 9
BOUND = 240.0
CLOSE = 1e-3


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a way to do it."""
    model, tokenizer = load()
    prompts = sentiment(4 if options.quick else PROMPTS, 2).calibration
    inputs = dict(
        tokenizer([text for text, _ in prompts], return_tensors="pt", padding=True, padding_side="left")
    )
    answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ANSWERS]

    def score(logits: Tensor) -> Tensor:
        return logits[:, answers[1]] - logits[:, answers[0]]

    layers = range(model.config.num_hidden_layers)
    each = model.config.num_attention_heads
    tried = layers[-2:] if options.quick else layers
    heads = [(layer, head) for layer in tried for head in range(1 if options.quick else each)]
    some = heads if options.quick else [(layer, layer % each) for layer in layers[1::EVERY]]
    times: dict[str, tuple[float, float]] = {}
    found = _timed(times, "replay", lambda: filter_heads(model, inputs, score, heads=heads, progress=False))
    plain = _forward(model, inputs, score)
    changes = _timed(
        times, "loop", lambda: [_forward(model, inputs, score, ACT([head])) - plain for head in some]
    )
    for head, change in zip(some, changes, strict=True):
        _agree(found.changes[heads.index(head)], change, head)
    count = len(layers) * each
    rounds = {"replay": count / len(heads), "loop": count / len(some)}
    return [_row(name, count, len(prompts), inputs, times[name], rounds[name]) for name in rounds]


def _row(
    name: str, count: int, prompts: int, inputs: dict[str, Any], taken: tuple[float, float], rounds: float
) -> dict[str, Any]:
    seconds, processor = (rounds * each for each in taken)
    return {
        "case": f"{name}, {count} heads, {prompts} prompts of {inputs['input_ids'].shape[1]} tokens",
        "heads_timed": round(count / rounds), "seconds": seconds, "processor": processor,
        "threads": torch.get_num_threads(), "bound": BOUND if name == "replay" else None,
    }  # fmt: skip


def _timed(times: dict[str, tuple[float, float]], name: str, work: Callable[[], Any]) -> Any:
    start, used = time.perf_counter(), time.process_time()
    found = work()
    times[name] = time.perf_counter() - start, time.process_time() - used
    return found


def _forward(model: Any, inputs: dict[str, Any], score: Callable[[Tensor], Tensor], *edits: ACT) -> Tensor:
    with torch.no_grad():
        if not edits:
            return score(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1])
        with regard.steer(model, *edits):
            return score(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1])


def _agree(found: Tensor, expected: Tensor, head: tuple[int, int]) -> None:
    off = float((found - expected).abs().max())
    if not off <= CLOSE:
        raise WrongResult(f"head {head}: replay and a whole forward differ by {off:.1e}.")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    return answer("calibration", parser(__doc__).parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
