"""Training on Bigram-Backcopy, and what forms inside: the sink, the drained value, the peak.

Of each layer are measured, on sequences that are never trained on, s the position of <s>:

    sink      mean over queries i > s that are no triggers of A_is
    copy      mean over triggers of A_{i, i-1}
    column    sum_{i > s} A_is / (T - 1 - s), and `median_column`, the median of the same over all keys
    delta     mean over the same queries as `sink` of S_is - mean_{j != s} S_ij
    drain     || W_O v_s || / mean_{j != s} || W_O v_j ||, and `value`, the first of the two
    peak      norm of the residual stream at s / the largest at any other position of the sequence, and
              `residual`, the first of the two

means over heads, sequences and positions. The rate is constant, as in the official code.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo
et al., 2024, arXiv 2410.13835). Status: agrees with the official code (optimisers, losses); partly our
choice (`peak`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError
from regard.models.backcopy import BackcopyModel, Trace
from regard.objectives.checkpoint import Log
from regard.objectives.loop import Loop
from regard.objectives.schedule import Schedule, device_of, mixed
from regard.tasks.character_pairs import BigramBackcopy

OPTIMISERS = ("adamw", "sgd")
HELD_OUT, HELD_OUT_SEED = 64, 2**62


@dataclass(frozen=True, kw_only=True)
class BackcopyRecipe(Schedule):
    """How to train on Bigram-Backcopy; the defaults are the paper's.

    Attributes:
        optimiser_name: `adamw`, with betas (0.9, 0.99), or `sgd`, whose momentum is the first of `betas`.
        rate: constant after the warm-up; the paper has 3e-4, 3e-3 with relu attention and 0.03 with SGD.
        clip: as good as none.
    """

    steps: int = 10_000
    batch: int = 512
    rate: float = 3e-4
    warmup: float = 0.0
    decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1e9
    optimiser_name: str = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimiser_name not in OPTIMISERS:
            raise RegardError(
                f"optimiser_name is {self.optimiser_name!r}; it must be one of {', '.join(OPTIMISERS)}."
            )

    def rate_at(self, step: int) -> float:
        warm = round(self.warmup * self.steps)
        return self.rate * min(1.0, (step + 1) / max(1, warm))

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW or SGD with momentum, with weight decay on every parameter."""
        options: dict[str, Any] = {"lr": self.rate, "weight_decay": self.decay}
        if self.optimiser_name == "sgd":
            return torch.optim.SGD(model.parameters(), momentum=self.betas[0], **options)
        return torch.optim.AdamW(model.parameters(), betas=self.betas, eps=1e-8, **options)


def train_backcopy(
    model: BackcopyModel,
    task: BigramBackcopy,
    recipe: BackcopyRecipe | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    evaluate_every: int = 100,
    checkpoint_every: int = 500,
    held_out: int = HELD_OUT,
    tick: Callable[[float], None] | None = None,
    **options: Any,
) -> Log:
    """Train a model on Bigram-Backcopy in place, and return how it went and what formed inside.

    Args:
        model: of the task's vocabulary.
        task: as `regard.tasks.bigram_backcopy` gives it; every batch is drawn anew.
        recipe: how; or its fields as `options`, as in `rate=3e-3, steps=1500`.
        out, resume, evaluate_every, checkpoint_every, tick: as for `regard.objectives.train`.
        held_out: sequences that are measured on.

    Returns:
        Losses of every step; held-out losses; and measures, `trigger_loss`, `bigram_loss`, and of each layer
        `sink.0`, `copy.0` and so on, see the head of this file.

    Raises: RegardError: where an option will not do, the model has another vocabulary or takes fewer
    tokens, or the loss is no longer finite.

    Example:
        >>> from regard.tasks import bigram_backcopy
        >>> task = bigram_backcopy(length=32)
        >>> model = BackcopyModel(task.vocabulary, dim=16)
        >>> log = train_backcopy(model, task, steps=2, batch=4, held_out=4)
        >>> sorted(log.measures[-1][1])[:3]
        ['bigram_loss', 'column.0', 'copy.0']
    """
    recipe = recipe or BackcopyRecipe.of("train_backcopy", **options)
    _check(model, task)
    tokens = task.draw(held_out, mixed(HELD_OUT_SEED, recipe.seed)).to(device_of(model))

    def descend(step: int) -> float:
        batch = task.draw(recipe.batch, mixed(recipe.seed, step)).to(device_of(model))
        loss = F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])
        loss.backward()
        return float(loss.detach())

    def judge() -> tuple[float, dict[str, float]]:
        found = look_inside(model, task, tokens)
        return found.pop("loss"), found

    loop = Loop(
        model=model, recipe=recipe, descend=descend, judge=judge, out=out, resume=resume, tick=tick,
        told={"recipe": asdict(recipe), "task": [*task.symbols, *task.triggers], "model": model.options},
        evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, words=_in_words,
    )  # fmt: skip
    return loop.run()


@torch.no_grad()
def look_inside(model: BackcopyModel, task: BigramBackcopy, tokens: Tensor) -> dict[str, float]:
    """Return losses and, of each layer, the sink, copying, drain and peak, on tokens [B, T + 1]."""
    given = tokens[:, :-1]
    trace = model.trace(given)
    trigger, other = task.losses(trace.logits, tokens)
    found = {
        "loss": float(F.cross_entropy(trace.logits.transpose(1, 2), tokens[:, 1:])),
        "trigger_loss": trigger, "bigram_loss": other,
    }  # fmt: skip
    calls = task.is_trigger(given)
    for layer in range(len(trace.weights)):
        inside = _layer(trace, layer, calls)
        found |= {f"{name}.{layer}": value for name, value in inside.items()}
    return found


def _layer(trace: Trace, layer: int, calls: Tensor) -> dict[str, float]:
    weights, scores = trace.weights[layer], trace.scores[layer]
    written, residual = trace.written[layer].mean(1), trace.residual[layer]
    length = calls.shape[1]
    idle = ~calls
    idle[:, 0] = False
    rows = torch.arange(length, device=calls.device)
    previous = weights[..., rows[1:], rows[1:] - 1].mean(1)
    mass = weights.mean((0, 1)).tril(-1).sum(0)[:-1] / (length - 1 - rows[:-1])
    rest = scores[..., 1:].masked_fill(scores[..., 1:].isinf(), 0).sum(-1) / rows.clamp_min(1)
    delta = (scores[..., 0] - rest).mean(1)
    return {
        "sink": float(weights[..., 0].mean(1)[idle].mean()),
        "copy": float(previous[calls[:, 1:]].mean()),
        "column": float(mass[0]),
        "median_column": float(mass.median()),
        "delta": float(delta[idle].mean()),
        "drain": float((written[:, 0] / written[:, 1:].mean(1)).mean()),
        "value": float(written[:, 0].mean()),
        "peak": float((residual[:, 0] / residual[:, 1:].amax(1)).mean()),
        "residual": float(residual[:, 0].mean()),
    }


def _check(model: BackcopyModel, task: BigramBackcopy) -> None:
    if not isinstance(model, BackcopyModel) or not isinstance(task, BigramBackcopy):
        raise RegardError("train_backcopy takes a BackcopyModel and a task of bigram_backcopy().")
    vocabulary, longest = model.options["vocabulary"], model.options["longest"]
    if vocabulary != task.vocabulary or longest < task.length:
        raise RegardError(
            f"the model knows {vocabulary} tokens and takes {longest}; the task has {task.vocabulary} and "
            f"sequences of {task.length}."
        )


def _in_words(log: Log) -> str:
    if not log.measures:
        return f"loss {log.losses[-1]:.3f}"
    found = log.measures[-1][1]
    sink = max(value for name, value in found.items() if name.startswith("sink."))
    return f"loss {log.losses[-1]:.3f}, at triggers {found['trigger_loss']:.3f}, sink {sink:.2f}"
