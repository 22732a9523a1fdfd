"""The loop of every training: steps, what is measured between them, files to go on from, and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard.errors import RegardError
from regard.objectives.checkpoint import Checkpoint, Log, folder_for
from regard.objectives.schedule import Schedule, check_count, device_of, mixed

Tick = Callable[[float], None]


def in_words(log: Log) -> str:
    """Return what the progress bar says."""
    held_out = f", held out {log.held_out[-1][1]:.3f}" if log.held_out else ""
    return f"loss {log.losses[-1]:.3f}{held_out}"


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A training of a model, in place.

    Attributes:
        model: on its device.
        recipe: see `Schedule`.
        descend: given a step, leaves the gradient of its loss in the parameters, and returns the loss.
        judge: returns the held-out loss and what else is written down with it.
        told: what the training is, as JSON holds it; a file of another is refused.
        out, resume, evaluate_every, checkpoint_every, tick: as for `regard.objectives.train`.
        words: what the progress bar says of the log.
    """

    model: nn.Module
    recipe: Schedule
    descend: Callable[[int], float]
    judge: Callable[[], tuple[float, dict[str, float]]]
    told: Mapping[str, Any]
    out: str | Path | None
    resume: bool
    evaluate_every: int
    checkpoint_every: int
    tick: Tick | None
    words: Callable[[Log], str] = in_words

    def __post_init__(self) -> None:
        check_count("evaluate_every", self.evaluate_every, 1)
        check_count("checkpoint_every", self.checkpoint_every, 1)

    def run(self) -> Log:
        """Train to the last step, from the file where there is one, and return how it went."""
        model, steps = self.model, self.recipe.steps
        optimiser = self.recipe.optimiser(model)
        kept = Checkpoint(folder_for(self.out), dict(self.told))
        log = (kept.restore(model, optimiser) if self.resume else None) or Log()
        begun = len(log.losses)
        was_training = model.training
        with self._shown(begun) as advance:
            for step in range(begun, steps + 1):
                if (step % self.evaluate_every == 0 or step == steps) and not log.evaluated(step):
                    log.add(step, *self.judge())
                if step > begun and (step % self.checkpoint_every == 0 or step == steps):
                    kept.save(model, optimiser, log)
                if step == steps:
                    break
                started = time.perf_counter()
                log.losses.append(self._step(optimiser, step))
                log.seconds += time.perf_counter() - started
                advance(step + 1, log)
        model.train(was_training)
        return log

    def _step(self, optimiser: torch.optim.Optimizer, step: int) -> float:
        device, recipe = device_of(self.model), self.recipe
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(step)
        self.model.train()
        optimiser.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(mixed(recipe.seed, step))
            value = self.descend(step)
        if not math.isfinite(value):
            raise RegardError(
                f"the loss of step {step} is {value}; train at a lower rate than {recipe.rate:g}."
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        optimiser.step()
        return value

    @contextmanager
    def _shown(self, done: int) -> Iterator[Callable[[int, Log], None]]:
        """A progress bar on standard error, where that is a terminal; or whoever asked to be told."""
        steps, tick = self.recipe.steps, self.tick
        if tick is not None:
            yield lambda step, log: tick(step / steps)
            return
        from tqdm import tqdm

        with tqdm(total=steps, initial=done, desc="training", unit="step", disable=None, leave=False) as bar:

            def advance(step: int, log: Log) -> None:
                bar.set_postfix_str(self.words(log), refresh=False)
                bar.update()

            yield advance
