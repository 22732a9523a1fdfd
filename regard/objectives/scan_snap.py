"""Training of the two tables of `regard.models.scan_snap`, by samples or by the exact flow, and what is seen.

At every step, of the exact attention c_{l | m, n} ~ P(l | n) exp(z_ml), means over next tokens:

    entropy      -sum_l c_l ln c_l, in nats
    common       sum of c over common tokens
    top          c of the heaviest distinct token
    tau          Kendall's rank correlation of c and P over the distinct tokens
    speed        ||c_t - c_{t-1}||_1

The *snap* is the first step after which the speed stays below 5 % of its peak.

Source: "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer" (Tian
et al., 2023, arXiv 2305.16380). Status: agrees with the paper (model, gradients); partly our choice (the
snap).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import RegardError
from regard.models.scan_snap import ScanSnapModel
from regard.runtime.table import Table
from regard.tasks.scan_snap import TokenComposition

MEASURES = ("loss", "entropy", "common", "top", "tau", "speed")
OPTIMISERS = ("sgd", "adam")
STILL = 0.05


@dataclass(eq=False)
class History:
    """What was seen, at step 0 and after every step.

    Attributes:
        measures: name -> values, of `loss`, `entropy`, `common`, `top`, `tau` and `speed`.
        attention: c, float64 [steps + 1, classes, V].
        z, y: the tables at the end.
    """

    measures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    attention: Any = None
    z: Tensor | None = None
    y: Tensor | None = None

    @property
    def table(self) -> Table:
        """One row a step."""
        return Table({"step": list(range(len(self.measures["loss"]))), **self.measures})

    @property
    def snap(self) -> int | None:
        """First step after which the speed stays below 5 % of its peak; None where it never does."""
        speed = np.array(self.measures["speed"][1:])
        if not speed.any():
            return 0
        moving = np.flatnonzero(speed >= STILL * speed.max())
        last = int(moving[-1]) + 1
        return last + 1 if last < len(speed) else None

    def to_csv(self, path: str | Path) -> None:
        """Write one row a step."""
        self.table.to_csv(path)

    def to_json(self, path: str | Path) -> None:
        """Write one row a step."""
        self.table.to_json(path)


class _Watcher:
    """Takes note of the exact attention of a model, step by step."""

    def __init__(self, data: TokenComposition, model: ScanSnapModel) -> None:
        self.data, self.model = data, model
        self.contexts = torch.from_numpy(data.contexts).to(model.z)
        self.numbers = torch.arange(data.classes, device=model.z.device)
        self.queries, self.targets = data.last_of(self.numbers), data.next_of(self.numbers)
        self.history = History()
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def note(self) -> None:
        c = self.model.attended(self.contexts, self.queries)
        loss = F.cross_entropy(self.model.logits(c), self.targets)
        held = c.double().cpu()
        found = {
            "loss": float(loss),
            "entropy": float(torch.special.entr(held).sum(1).mean()),
            "common": float(held[:, : self.data.num_common].sum(1).mean()),
            "top": float(np.mean([float(held[n, self.data.distinct(n)].max()) for n in self.numbers])),
            "tau": float(np.mean([self._tau(held, int(n)) for n in self.numbers])),
            "speed": float((held - self.kept[-1]).abs().sum(1).mean()) if self.kept else 0.0,
        }
        self.kept.append(held)
        for name, value in found.items():
            self.history.measures[name].append(value)

    def _tau(self, held: Tensor, number: int) -> float:
        some = self.data.distinct(number)
        return kendall(held[number, some].numpy(), self.data.contexts[number, some])

    def done(self) -> History:
        self.history.attention = torch.stack(self.kept).numpy()
        self.history.z, self.history.y = self.model.z.detach().clone(), self.model.y.detach().clone()
        return self.history


def kendall(a: Any, b: Any) -> float:
    """Return Kendall's rank correlation (tau-b) of two vectors; NaN where one is constant."""
    one, other = (np.sign(np.subtract.outer(x, x)) for x in (np.asarray(a), np.asarray(b)))
    norm = math.sqrt(float((one**2).sum()) * float((other**2).sum()))
    return float((one * other).sum()) / norm if norm else float("nan")


def train_scan_snap(
    data: TokenComposition,
    model: ScanSnapModel | None = None,
    *,
    steps: int = 100,
    batch: int = 128,
    length: int = 128,
    rate_z: float = 1.0,
    rate_y: float = 1.0,
    optimiser: str = "sgd",
    momentum: float = 0.9,
    seed: int = 0,
    tick: Callable[[float], None] | None = None,
) -> History:
    """Train the two tables on sequences drawn anew at each step, and return what was seen.

    Args:
        data: what is drawn.
        model: trained in place, on its device; default one of zeros, in float32.
        steps: optimiser steps.
        batch: sequences a step; the loss is their mean.
        length: tokens of a sequence, the query included; the paper has 128.
        rate_z, rate_y: learning rates of attention and decoder; momentum multiplies both by up to 10.
        optimiser: `sgd` or `adam`.
        momentum: of SGD.
        seed: of what is drawn.
        tick: called with the share of steps done, in place of a progress bar.

    Raises:
        RegardError: where an option will not do, or the loss is no longer finite.

    Example:
        >>> seen = train_scan_snap(TokenComposition(), steps=20)
        >>> [round(seen.measures["common"][i], 2) for i in (0, -1)]
        [0.65, 0.45]
    """
    _check(steps, rate_z, rate_y, optimiser)
    model = model or ScanSnapModel(data.vocabulary)
    generator = torch.Generator().manual_seed(seed)
    groups = [{"params": [model.z], "lr": rate_z}, {"params": [model.y], "lr": rate_y}]
    descent = torch.optim.SGD(groups, momentum=momentum) if optimiser == "sgd" else torch.optim.Adam(groups)
    watcher = _Watcher(data, model)
    watcher.note()
    with _shown(steps, tick) as advance:
        for step in range(steps):
            tokens, targets = (x.to(model.z.device) for x in data.draw(batch, length, generator))
            loss = F.cross_entropy(model(tokens), targets)
            _finite(float(loss.detach()), step, rate_z, rate_y)
            descent.zero_grad(set_to_none=True)
            loss.backward()
            descent.step()
            watcher.note()
            advance(step + 1)
    return watcher.done()


def flow(
    data: TokenComposition,
    model: ScanSnapModel | None = None,
    *,
    steps: int = 1000,
    size: float = 0.1,
    rate_z: float = 1.0,
    rate_y: float = 1.0,
    tick: Callable[[float], None] | None = None,
) -> History:
    """Follow the gradient flow of the population, by the formulas of Lemma 1 and no samples.

    Args:
        data: whose exact P(l | n) is taken.
        model: moved in place; default one of zeros, in float64.
        steps: Euler steps.
        size: time of a step.
        rate_z, rate_y: learning rates, without momentum.
        tick: as for `train_scan_snap`.

    Raises:
        RegardError: as `train_scan_snap`.
    """
    _check(steps, rate_z, rate_y, "sgd")
    if not size > 0:
        raise RegardError(f"size is {size}; it must be above 0.")
    model = model or ScanSnapModel(data.vocabulary, dtype=torch.float64)
    watcher = _Watcher(data, model)
    shares = torch.full_like(watcher.contexts[:, 0], 1 / data.classes)
    watcher.note()
    with _shown(steps, tick) as advance:
        for step in range(steps):
            moved = model.gradients(watcher.contexts, watcher.queries, watcher.targets, shares)
            with torch.no_grad():
                model.z.add_(moved.z, alpha=size * rate_z)
                model.y.add_(moved.y, alpha=size * rate_y)
            watcher.note()
            _finite(watcher.history.measures["loss"][-1], step, rate_z, rate_y)
            advance(step + 1)
    return watcher.done()


def _check(steps: int, rate_z: float, rate_y: float, optimiser: str) -> None:
    if steps < 1 or min(rate_z, rate_y) < 0 or not math.isfinite(rate_z + rate_y):
        raise RegardError(
            f"steps is {steps}, rate_z {rate_z} and rate_y {rate_y}; they must be 1, 0 and 0 at least."
        )
    if optimiser not in OPTIMISERS:
        raise RegardError(f"optimiser is {optimiser!r}; it must be one of {', '.join(OPTIMISERS)}.")


def _finite(loss: float, step: int, rate_z: float, rate_y: float) -> None:
    if not math.isfinite(loss):
        raise RegardError(
            f"the loss of step {step} is {loss}; train at lower rates than rate_z {rate_z:g} and rate_y "
            f"{rate_y:g}."
        )


def _shown(steps: int, tick: Callable[[float], None] | None) -> Any:
    from contextlib import nullcontext

    from regard.runtime.progress import bar

    if tick is not None:
        return nullcontext(lambda done: tick(done / steps))
    return _each(bar("Training", steps))


class _each:
    """A bar that is moved on by one, whatever step it is told."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> Callable[[int], None]:
        advance = self.inner.__enter__()
        return lambda done: advance(1)

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
