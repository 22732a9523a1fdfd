"""Training of tiny language models: the next-token loss, in the one loop of `loop.py`.

A batch is drawn from the training part at places that depend on the seed and the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.mechanism import Mechanism
from regard.errors import RegardError
from regard.objectives.checkpoint import Log
from regard.objectives.loop import Loop
from regard.objectives.schedule import PRECISIONS, STEPS, Schedule, check_count, device_of, mixed
from regard.tasks.corpus import Corpus

Measure = Callable[[nn.Module], Mapping[str, float]]
Loss = Callable[[nn.Module, Tensor], Tensor]


class Inputs(Protocol):
    """What a model reads in place of its inputs, such as `regard.objectives.meap_objective.MEAP`."""

    def __call__(self, ids: Tensor, step: int) -> Tensor:
        """Return what is read at a step, int64 [B, T], of the inputs [B, T], which are not changed."""
        ...

    def told(self) -> dict[str, Any]:
        """Return what it is, as JSON holds it; a training's file is refused by another."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """How to train a language model.

    Attributes:
        length: tokens predicted in a sequence; a batch is of sequences.
        accumulate: pieces that a batch is computed in, to save memory.
        precision: "no", or "bf16" for bfloat16 where that is safe.
    """

    length: int = 128
    accumulate: int = 1
    precision: str = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("length", self.length, 1)
        check_count("accumulate", self.accumulate, 1)
        if self.accumulate > self.batch:
            raise RegardError(f"accumulate is {self.accumulate}, and a batch has {self.batch} sequences.")
        if self.precision not in PRECISIONS:
            raise RegardError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}.")


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
    inputs: Inputs | None = None,
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
        inputs: what the model reads in place of tokens [B, T], such as some of them hidden; targets stay, and
            so does the held-out loss. Not together with `loss`.
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
    recipe = recipe or Recipe.of("train", steps=steps, **options)
    _check(model, data, recipe)
    check_count("windows", windows, 0)
    if loss is not None and inputs is not None:
        raise RegardError("both loss and inputs were given; a loss reads what it likes itself.")
    told = {"recipe": asdict(recipe), "data": data.digest(), "windows": windows, "about": dict(about or {})}
    told["inputs"] = "clean" if inputs is None else inputs.told()
    batches, device = _Batches(data.train, recipe), device_of(model)

    def descend(step: int) -> float:
        tokens, total = batches.at(step), 0.0
        read = tokens[:, :-1] if inputs is None else inputs(tokens[:, :-1], step)
        parts = (x.to(device).tensor_split(recipe.accumulate) for x in (tokens, read))
        for piece, given in zip(*parts, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                if loss is not None:
                    value = loss(model, piece)
                else:
                    value = _next_token_and_auxiliary(model, given, piece[:, 1:])
            value = value * (len(piece) / recipe.batch)
            value.backward()
            total += float(value.detach())
        return total

    def judge() -> tuple[float, dict[str, float]]:
        return evaluate(model, data, recipe.length, windows, recipe.batch), _measures(model, measure)

    loop = Loop(
        model=model, recipe=recipe, descend=descend, judge=judge, told=told, out=out, resume=resume,
        evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, tick=tick,
    )  # fmt: skip
    return loop.run()


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of each token after the first, of tokens int64 [B, T + 1]."""
    return _loss(model, tokens[:, :-1], tokens[:, 1:])


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = logits_of(model, inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _next_token_and_auxiliary(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = _loss(model, inputs, targets)
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


class _Batches:
    """The tokens of a step, int64 [batch, length + 1], which depend on the seed and the step alone."""

    def __init__(self, tokens: Tensor, recipe: Recipe) -> None:
        self.tokens, self.recipe = tokens, recipe

    def at(self, step: int) -> Tensor:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(mixed(recipe.seed, step))
        span = len(self.tokens) - recipe.length
        starts = torch.randint(span, (recipe.batch, 1), generator=generator)
        return self.tokens[starts + torch.arange(recipe.length + 1)]


def _check(model: nn.Module, data: Corpus, recipe: Recipe) -> None:
    if not isinstance(data, Corpus):
        raise RegardError(f"data must be a Corpus, as packaged() gives, and is {type(data).__name__}.")
    for part, name in ((data.train, "training"), (data.held_out, "held-out")):
        if len(part) <= recipe.length:
            raise RegardError(
                f"the {name} text has {len(part)} tokens; sequences of length {recipe.length} need "
                f"{recipe.length + 1}."
            )


def _measures(model: nn.Module, measure: Measure | None) -> dict[str, float]:
    if measure is None:
        return {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = {name: float(value) for name, value in measure(model).items()}
    model.train(was_training)
    return found
