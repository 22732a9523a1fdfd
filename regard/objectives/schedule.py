"""The rate of learning, the optimiser and the chance of every training.

    rate_s = rate * s / warmup                                     s <= warmup
    rate_s = low + (rate - low) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2,  low = rate / 10

All chance of a step depends on the seed and the step alone, dropout included, so that a training that goes on
from its file has the losses of one that was never stopped.

Source: AdamW is Loshchilov and Hutter, 2017, arXiv 1711.05101; the schedule and the betas those of GPT-3
(Brown et al., 2020, arXiv 2005.14165, appendix B). Status: our choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from regard.errors import RegardError

STEPS = 300
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How to train, whatever is trained.

    Attributes:
        steps: optimiser steps.
        batch: samples a step.
        rate: the highest learning rate.
        warmup: share of the steps in which the rate grows to that.
        decay: weight decay, of matrices alone.
        betas: AdamW's.
        clip: the largest norm of the gradient; more is scaled down to it.
        seed: of batches and of everything drawn while training.
    """

    steps: int = STEPS
    batch: int = 16
    rate: float = 3e-3
    warmup: float = 0.05
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        for name in ("rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RegardError(f"{name} is {getattr(self, name)}; it must be a number above 0.")
        if not 0 <= self.warmup <= 1 or not self.decay >= 0:
            raise RegardError(
                f"warmup is {self.warmup} and decay {self.decay}; they must be 0 to 1, and from 0."
            )

    @classmethod
    def of(cls, caller: str, **options: Any) -> Self:
        """Return the recipe with these options; one that it does not have is refused in the caller's name."""
        unknown = [name for name in options if name not in cls.__dataclass_fields__]
        if unknown:
            takes = ", ".join(cls.__dataclass_fields__)
            raise RegardError(f"{caller} takes no {unknown[0]!r}; a recipe has {takes}.")
        return cls(**options)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return what a model is trained by: AdamW, without weight decay on vectors."""
        return adamw(model, self)


def adamw(model: nn.Module, recipe: Schedule) -> torch.optim.AdamW:
    """Return the optimiser of what a model trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RegardError(f"{type(model).__name__} has no parameter to train.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, betas=recipe.betas)


def mixed(seed: int, step: int) -> int:
    """Return the seed of a step."""
    return (seed * 1_000_003 + step) % 2**63


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
