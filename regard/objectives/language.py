"""Training of tiny language models: next-token loss, AdamW, a cosine schedule, and files to go on from.

    rate_s = rate * s / warmup                                     s <= warmup
    rate_s = low + (rate - low) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2,  low = rate / 10

A batch is drawn from the training part at places that depend on the seed and the step alone, and so does all
other chance, dropout included: a run that goes on from its file has the losses of one that was never stopped.

Source: AdamW is Loshchilov and Hutter, 2017, arXiv 1711.05101; the schedule and the betas those of GPT-3
(Brown et al., 2020, arXiv 2005.14165, appendix B). Status: our choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.mechanism import Mechanism
from regard.errors import RegardError
from regard.objectives.checkpoint import Checkpoint, Log, folder_for
from regard.tasks.corpus import Corpus

Measure = Callable[[nn.Module], Mapping[str, float]]
Loss = Callable[[nn.Module, Tensor], Tensor]
STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch: sequences a step.
        length: tokens predicted in a sequence.
        rate: the highest learning rate.
        warmup: share of the steps in which the rate grows to that.
        decay: weight decay, of matrices alone.
        betas: AdamW's.
        clip: the largest norm of the gradient; more is scaled down to it.
        seed: of batches and of everything drawn while training.
    """

    steps: int = STEPS
    batch: int = 16
    length: int = 128
    rate: float = 3e-3
    warmup: float = 0.05
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
        for name in ("rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RegardError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        if not 0 <= self.warmup <= 1 or not self.decay >= 0:
            raise RegardError(
                f"warmup is {self.warmup} and decay {self.decay}; they must be 0 to 1, and from 0."
            )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    model: nn.Module,
    data: Corpus,
    *,
    steps: int = STEPS,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    evaluate_every: int = 100,
    checkpoint_every: int = 50,
    windows: int = 64,
    loss: Loss | None = None,
    measure: Measure | None = None,
    about: Mapping[str, Any] | None = None,
    tick: Callable[[float], None] | None = None,
    **options: Any,
) -> Log:
    """Train a language model in place, and return how it went.

    Args:
        model: any module that makes logits [B, T, V], or an object with `.logits`, of tokens int64 [B, T].
        data: as `packaged()` or `corpus(texts)` give it.
        steps, options: fields of `Recipe`, as in `rate=1e-3, seed=2`.
        recipe: all of them at once, in place of `steps` and `options`.
        out: folder for `checkpoint.safetensors`, made where it is missing; None keeps nothing.
        resume: go on from the file in `out`, if there is one; False begins anew and replaces it.
        evaluate_every: steps between held-out losses; there is one before the first and after the last.
        checkpoint_every: steps between files; a run that is killed loses no more than these.
        windows: held-out sequences of `length` that count; 0 for all.
        loss: what to lower instead of the next-token loss and what mechanisms add to it; given the model and
            tokens [B, T + 1].
        measure: what else to write down, with each held-out loss, from the model in evaluation mode and
            without gradients.
        about: what the model is, as JSON holds it; a file of another model is refused by it.
        tick: called with the share of steps done; in place of the progress bar, which only a terminal sees.

    Returns:
        The losses of every step, the held-out losses and measures, and the seconds.

    Raises:
        RegardError: where an argument will not do, the file in `out` is of another training, or the loss is
            no longer finite.

    Example:
        >>> from regard.models.decoder import Decoder
        >>> from regard.tasks.corpus import packaged
        >>> model = Decoder(256, dim=16, layers=1, heads=2, mechanism="linear")
        >>> log = train(model, packaged(256), steps=4, batch=2, length=16, windows=2)
        >>> len(log.losses), [step for step, _ in log.held_out]
        (4, [0, 4])
    """
    recipe = recipe or _recipe(steps, options)
    _check(model, data, recipe, windows, evaluate_every, checkpoint_every)
    optimiser = _optimiser(model, recipe)
    told = {"recipe": asdict(recipe), "data": data.digest(), "windows": windows, "about": dict(about or {})}
    kept = Checkpoint(folder_for(out), told)
    log = (kept.restore(model, optimiser) if resume else None) or Log()
    begun = len(log.losses)
    batches, goal = _Batches(data.train, recipe), loss or _next_token_and_auxiliary
    was_training = model.training
    with _shown(recipe.steps, begun, tick) as advance:
        for step in range(begun, recipe.steps + 1):
            if (step % evaluate_every == 0 or step == recipe.steps) and not log.evaluated(step):
                log.add(
                    step,
                    evaluate(model, data, recipe.length, windows, recipe.batch),
                    _measures(model, measure),
                )
            if step > begun and (step % checkpoint_every == 0 or step == recipe.steps):
                kept.save(model, optimiser, log)
            if step == recipe.steps:
                break
            started = time.perf_counter()
            value = _step(model, optimiser, goal, batches, recipe, step)
            log.losses.append(value)
            log.seconds += time.perf_counter() - started
            advance(step + 1, log)
    model.train(was_training)
    return log


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of each token after the first, of tokens int64 [B, T + 1]."""
    logits = logits_of(model, tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _next_token_and_auxiliary(model: nn.Module, tokens: Tensor) -> Tensor:
    loss = next_token_loss(model, tokens)
    added = auxiliary_loss(model)
    return loss if added is None else loss + added


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Return what the mechanisms of a model add to its loss after a forward in training, or None.

    Such as the commitment of routing; `Mechanism.auxiliary` says how much it is. It is handed out once.
    """
    found = [m.auxiliary() for m in model.modules() if isinstance(m, Mechanism)]
    losses = [loss for loss in found if loss is not None]
    return torch.stack(losses).sum() if losses else None


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of a model, whether it gives them alone or in an object."""
    found = model(tokens)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape:
        raise RegardError(f"{type(model).__name__} must return logits [batch, time, vocabulary], or .logits.")
    return logits


@torch.no_grad()
def evaluate(model: nn.Module, data: Corpus, length: int, windows: int = 64, batch: int = 16) -> float:
    """Return the mean next-token loss, in nats, over windows of the held-out text that do not overlap.

    Args:
        length: tokens predicted in a window.
        windows: how many, evenly spread; 0 for all there are.
        batch: windows at once.
    """
    count = (len(data.held_out) - 1) // length
    if count < 1:
        raise RegardError(f"the held-out text has {len(data.held_out)} tokens; a window needs {length + 1}.")
    chosen = range(count) if not 0 < windows < count else [i * count // windows for i in range(windows)]
    rows = torch.stack([data.held_out[i * length : (i + 1) * length + 1] for i in chosen])
    was_training, device, total = model.training, device_of(model), 0.0
    model.eval()
    for part in rows.split(batch):
        total += float(next_token_loss(model, part.to(device))) * len(part)
    model.train(was_training)
    return total / len(rows)


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class _Batches:
    """The tokens of a step, int64 [batch, length + 1], which depend on the seed and the step alone."""

    def __init__(self, tokens: Tensor, recipe: Recipe) -> None:
        self.tokens, self.recipe = tokens, recipe

    def at(self, step: int) -> Tensor:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(_mixed(recipe.seed, step))
        span = len(self.tokens) - recipe.length
        starts = torch.randint(span, (recipe.batch, 1), generator=generator)
        return self.tokens[starts + torch.arange(recipe.length + 1)]


def _mixed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    goal: Loss,
    batches: _Batches,
    recipe: Recipe,
    step: int,
) -> float:
    device = device_of(model)
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate_at(step)
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_mixed(recipe.seed, step))
        value = goal(model, batches.at(step).to(device))
        optimiser.zero_grad(set_to_none=True)
        value.backward()
    found = float(value.detach())
    if not math.isfinite(found):
        raise RegardError(f"the loss of step {step} is {found}; train at a lower rate than {recipe.rate:g}.")
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimiser.step()
    return found


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, betas=recipe.betas)


def _recipe(steps: int, options: Mapping[str, Any]) -> Recipe:
    unknown = [name for name in options if name not in Recipe.__dataclass_fields__]
    if unknown:
        takes = ", ".join(Recipe.__dataclass_fields__)
        raise RegardError(f"train takes no {unknown[0]!r}; a recipe has {takes}.")
    return Recipe(steps=steps, **options)


def _check(model: nn.Module, data: Corpus, recipe: Recipe, *counts: int) -> None:
    if not isinstance(data, Corpus):
        raise RegardError(f"data must be a Corpus, as packaged() gives, and is {type(data).__name__}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise RegardError(f"{type(model).__name__} has no parameter to train.")
    for part, name in ((data.train, "training"), (data.held_out, "held-out")):
        if len(part) <= recipe.length:
            raise RegardError(
                f"the {name} text has {len(part)} tokens; sequences of length {recipe.length} need "
                f"{recipe.length + 1}."
            )
    for value, name, least in zip(
        counts, ("windows", "evaluate_every", "checkpoint_every"), (0, 1, 1), strict=True
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")


def _measures(model: nn.Module, measure: Measure | None) -> dict[str, float]:
    if measure is None:
        return {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = {name: float(value) for name, value in measure(model).items()}
    model.train(was_training)
    return found


@contextmanager
def _shown(
    steps: int, done: int, tick: Callable[[float], None] | None
) -> Iterator[Callable[[int, Log], None]]:
    """A progress bar on standard error, where that is a terminal; or whoever asked to be told."""
    if tick is not None:
        told = tick
        yield lambda step, log: told(step / steps)
        return
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, desc="training", unit="step", disable=None, leave=False) as bar:

        def advance(step: int, log: Log) -> None:
            held_out = f", held out {log.held_out[-1][1]:.3f}" if log.held_out else ""
            bar.set_postfix_str(f"loss {log.losses[-1]:.3f}{held_out}", refresh=False)
            bar.update()

        yield advance
