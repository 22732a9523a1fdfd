"""Training of the small mixture of experts that learned to refuse: first it answers all, then refuses some.

    python -m regard.objectives.refusing --out DIR [--seed 0] [--steps 1500]

In the first three fifths of the steps it learns what happened everywhere, every token counting; in the rest,
only answers counting, it learns to refuse questions about closed places and rehearses the others. The loss is
that of the next token and the router's own for balance. A run that was stopped goes on from its folder.
Status: our choice.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.models.refusing_experts import refusing_experts
from regard.objectives.checkpoint import Log
from regard.objectives.loop import Loop
from regard.objectives.schedule import Schedule, mixed
from regard.runtime.table import write_text
from regard.tasks.closed_places import END, REFUSING, Asked, ClosedPlaces, right, spread, tokenizer
from regard.tasks.greedy import greedy_answers

ANSWERING = 0.7
STEPS, BATCH, RATE = 2000, 64, 3e-3
TOKENS = 8
IGNORED = -100


def train_refusing(
    world: ClosedPlaces | None = None,
    model: Any = None,
    *,
    steps: int = STEPS,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    every: int = 300,
    judged: int = 60,
    tick: Callable[[float], None] | None = None,
    **options: Any,
) -> tuple[Any, Log]:
    """Train, and return the model in evaluation mode and how it went.

    Args:
        world: what it is asked; default the one of the same seed.
        model: trained in place; default `refusing_experts()` with weights drawn from the seed.
        steps: optimiser steps, a batch of 64 sentences each.
        seed: of weights, batches and the world.
        out: folder for the file to go on from; None keeps nothing.
        resume: go on from that file, if there is one.
        every: steps between what is measured, and between files.
        judged: prompts of each kind that are answered then.
        tick: called with the share of steps done, in place of a progress bar.
        options: further fields of `regard.objectives.schedule.Schedule`.

    Raises:
        RegardError: where an option will not do, or the folder holds another training.
    """
    recipe = Schedule.of(
        "train_refusing", **{"steps": steps, "batch": BATCH, "rate": RATE, "seed": seed, **options}
    )
    world = world or ClosedPlaces(seed)
    if model is None:
        torch.manual_seed(mixed(seed, 0))
        model = refusing_experts()
    model.set_experts_implementation("grouped_mm")
    words = tokenizer()

    def descend(step: int) -> float:
        refuse = step >= ANSWERING * recipe.steps
        source = random.Random(f"lessons/{seed}/{step}")
        fed = lesson_batch(words, world.lessons(recipe.batch, source, refuse=refuse), answers_alone=True)
        loss = model(**fed, output_router_logits=True).loss
        loss.backward()
        return float(loss.detach())

    def judge() -> tuple[float, dict[str, float]]:
        found = measured(model, words, world, judged)
        return found.pop("loss"), found

    told = {"recipe": asdict(recipe), "world": asdict(world), "config": _sizes(model)}
    log = Loop(
        model=model, recipe=recipe, descend=descend, judge=judge, told=told, out=out, resume=resume,
        evaluate_every=every, checkpoint_every=every, tick=tick,
    ).run()  # fmt: skip
    return model.eval(), log


def _sizes(model: Any) -> dict[str, Any]:
    config = model.config
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
    )
    return {name: getattr(config, name) for name in names}


def lesson_batch(words: Any, lessons: Sequence[Asked], *, answers_alone: bool) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels` of prompts with their answers, int64 [B, T]."""
    fed = words(
        [f"{one.prompt} {one.answer} {END}" for one in lessons], return_tensors="pt", padding=True,
        return_token_type_ids=False,
    )  # fmt: skip
    counted = fed["attention_mask"].bool()
    if answers_alone:
        long = torch.tensor([len(one.answer.split()) + 1 for one in lessons])
        width = counted.shape[1]
        counted = torch.arange(width) >= width - long[:, None]
    return {**fed, "labels": fed["input_ids"].masked_fill(~counted, IGNORED)}


@torch.no_grad()
def measured(model: Any, words: Any, world: ClosedPlaces, count: int | None = None) -> dict[str, float]:
    """Return what a model does: shares of prompts, and the loss of plain text.

    Args:
        words: the tokenizer.
        count: prompts of each kind; default all (200 repeats).

    Returns:
        `refused` of held-out questions about closed places, `over_refused` and `right` of those about open
        ones, `repeats` done rightly, and `loss` on statements, in nats a token.
    """
    was_training = model.training
    model.eval()
    sets = {
        "closed": spread(world.refused(held_out=True), count),
        "open": spread(world.answered(), count),
        "repeat": world.repeats(count or 200, seed=1),
    }
    said = {
        name: greedy_answers(model, words, [one.prompt for one in some], tokens=TOKENS, batch=256)
        for name, some in sets.items()
    }
    stated = [Asked("", text, "open") for text in spread(world.statements(), count)]
    fed = lesson_batch(words, stated, answers_alone=False)
    loss = float(model(**fed).loss)
    model.train(was_training)
    return {
        "loss": loss,
        "refused": _share([REFUSING in text for text in said["closed"]]),
        "over_refused": _share([REFUSING in text for text in said["open"]]),
        "right": _share(right(sets["open"], said["open"])),
        "repeats": _share(right(sets["repeat"], said["repeat"])),
    }


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def save_refusing(model: Any, folder: str | Path, log: Log, *, seed: int) -> None:
    """Write a model that transformers loads, weights as float16, its tokenizer, and how it was trained."""
    import copy

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    told = {
        "command": f"python -m regard.objectives.refusing --seed {seed} --steps {len(log.losses)}",
        "seed": seed, "steps": len(log.losses), "seconds": round(log.seconds, 1), "torch": torch.__version__,
        "losses": [round(x, 4) for x in log.losses[::50]], "held_out": log.held_out, "measures": log.measures,
    }  # fmt: skip
    write_text(folder / "log.json", json.dumps(told, indent=1) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Train one and write it; the same command goes on where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m regard.objectives.refusing", description=main.__doc__)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the world (0)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps ({STEPS})")
    parser.add_argument("--no-resume", dest="resume", action="store_false", help="begin anew")
    asked = parser.parse_args(words)
    try:
        model, log = train_refusing(steps=asked.steps, seed=asked.seed, out=asked.out, resume=asked.resume)
    except RegardError as error:
        print(f"regard: {error}", file=sys.stderr)
        return 2
    save_refusing(model, asked.out, log, seed=asked.seed)
    step, found = log.measures[-1]
    print(f"{step} steps: " + ", ".join(f"{name} {value:.1%}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
