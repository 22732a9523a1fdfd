"""What does hiding inputs cost a step of training? Steps of plain next-token prediction beside it.

`none` is a step of a small Llama with AdamW on tokens; `hide` the same by `MEAP`, `callback` through the hook
of `MEAPCallback`. `draw` is the hiding alone, and `official` that of the authors' loop: one set of positions
for all rows. Seconds are those of the processor, so that neighbours on a shared machine count little.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.models.tiny_llama import random_llama
from regard.objectives.meap_objective import MEAP
from regard.objectives.meap_trainer import MEAPCallback

VOCABULARY, MASK = 512, 511
SIZES = ((4, 256, 128), (1, 1024, 128))


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row a size: rows, tokens, width."""
    _check()
    rounds = options.rounds or (1 if options.quick else 7)
    sizes = ((2, 32, 16),) if options.quick else SIZES
    return [_row(*size, rounds) for size in sizes]


def _check() -> None:
    """Refuse a hiding that hides another number of tokens, or changes labels."""
    ids = torch.randint(MASK, (3, 40))
    kept = ids.clone()
    hidden, where = MEAP(mask_id=MASK).hide(ids, step=0)
    if where.sum(1).tolist() != [6] * 3 or not torch.equal(ids, kept) or not (hidden[where] == MASK).all():
        raise WrongResult("hiding is off")


def _official(ids: Tensor) -> Tensor:
    random.seed(50)
    places = random.sample(range(ids.shape[1] - 1), max(1, int(ids.shape[1] * 0.15)))
    hidden = ids.clone()
    hidden[:, places] = MASK
    return hidden


def _seconds(way: Callable[[], Any]) -> float:
    begun = time.process_time()
    way()
    return time.process_time() - begun


def _row(batch: int, length: int, width: int, rounds: int) -> dict[str, Any]:
    with torch.enable_grad():
        model = random_llama(VOCABULARY, width=width, layers=4, mlp=2 * width).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids, objective = torch.randint(MASK, (batch, length)), MEAP(mask_id=MASK)
    callback = MEAPCallback(objective)

    def step(given: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            model(given(), labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def hooked() -> None:
        callback.on_train_begin(SimpleNamespace(process_index=0, world_size=1), None, None, model=model)
        step(lambda: ids)
        callback.on_train_end(None, None, None)

    ways: dict[str, Callable[[], Any]] = {
        "none": partial(step, lambda: ids),
        "hide": partial(step, lambda: objective(ids, 0)),
        "callback": hooked,
        "draw": lambda: objective(ids, 0),
        "official": lambda: _official(ids),
    }
    times = interleaved({name: partial(_seconds, way) for name, way in ways.items()}, rounds)
    low, high = times.spread("hide", "none")
    return {
        "case": [batch, length, width],
        **{f"{name}_ms": 1e3 * times.median(name) for name in ways},
        "hide_over_none": times.ratio("hide", "none"),
        "ratios": f"{low:.3f} - {high:.3f}",
        "callback_over_none": times.ratio("callback", "none"),
        "draw_share": times.ratio("draw", "none"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    return answer("meap", parser(__doc__).parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
