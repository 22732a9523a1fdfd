"""How much a classifier bears: its accuracy while its attention scores are perturbed as badly as is found.

    r_0 = 0;   r_k = eps g_k / ||g_k||,   g_k = dL / da at a + r_(k-1)         the worst loss of all k counts

A random perturbation of the same length stands beside it. Source: the robustness curves of Kitada and
Iyatomi, 2020, arXiv 2009.12064. Status: partly our choice (steps: one is what training uses, and need not
find the worst).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import RegardError
from regard.objectives.adversarial.directions import LogitsOf, Scores, random_unit, scaled, unit
from regard.objectives.adversarial.reach import Reach
from regard.runtime.table import Table

STEPS = 5
CURVE = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Attacked:
    """What an attack did to each sequence.

    Attributes:
        loss: the highest found, in nats, float32 [B].
        right: whether the prediction stayed right in every step, bool [B].
        perturbation: of the highest loss.
    """

    loss: Tensor
    right: Tensor
    perturbation: Scores


def attacked(
    logits_of: LogitsOf, labels: Tensor, valid: Sequence[Tensor], eps: float, steps: int = STEPS
) -> Attacked:
    """Return what the worst perturbation of a length does, as far as so many steps find it.

    Args:
        logits_of: logits [B, C] with tensors added to the attention scores.
        labels: int64 [B].
        valid: which scores count, bool [B, ..., keys] each.
        eps: length of the perturbation of a sequence.
        steps: gradients taken.
    """
    worst = tuple(torch.zeros(m.shape, device=m.device) for m in valid)
    loss, right, gradient = _look(logits_of, labels, worst)
    for _ in range(steps if eps else 0):
        r = scaled(unit(gradient, valid), eps)
        now, still_right, gradient = _look(logits_of, labels, r)
        worse = now > loss
        worst = tuple(
            torch.where(worse.view(-1, *[1] * (x.ndim - 1)), x, w) for x, w in zip(r, worst, strict=True)
        )
        loss, right = torch.maximum(loss, now), right & still_right
    return Attacked(loss, right, worst)


def _look(logits_of: LogitsOf, labels: Tensor, r: Scores) -> tuple[Tensor, Tensor, Scores]:
    added = tuple(x.detach().requires_grad_() for x in r)
    with torch.enable_grad():
        logits = logits_of(added).float()
        each = F.cross_entropy(logits, labels, reduction="none")
        gradient = torch.autograd.grad(each.sum(), added, retain_graph=True, allow_unused=True)
    found = tuple(torch.zeros_like(a) if g is None else g for g, a in zip(gradient, added, strict=True))
    return each.detach(), logits.argmax(1) == labels, found


def robustness_curve(
    reach: Reach,
    batches: Iterable[Mapping[str, Tensor]],
    eps: Sequence[float] = CURVE,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> Table:
    """Return accuracy and loss under perturbations of several lengths, a row each.

    Args:
        reach: as `reach(model)` gives it, the model in evaluation mode.
        batches: `input_ids`, `attention_mask` [B, T] and `labels` [B].
        eps: lengths, in units of scores.
        steps: of the attack.
        seed: of the random perturbations.

    Returns:
        Columns `eps`, `accuracy`, `loss` (nats), `random_accuracy`, `random_loss`.

    Raises:
        RegardError: for a model in training mode, or a length that is negative.
    """
    if reach.model.training:
        raise RegardError("the model is in training mode, where dropout adds to any attack; call eval().")
    if not eps or min(eps) < 0:
        raise RegardError(f"eps is {list(eps)}; it must be lengths from 0.")
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(len(eps), 4, dtype=torch.float64)
    count = 0
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        labels, valid = batch["labels"], reach.valid(batch["attention_mask"])
        logits_of = reach.reader(**inputs)
        drawn = _random(valid, generator)
        count += len(labels)
        for row, size in enumerate(eps):
            found = attacked(logits_of, labels, valid, size, steps)
            with torch.no_grad():
                logits = logits_of(scaled(drawn, size)).float()
            other = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
            sums[row] += torch.stack(
                [found.right.sum().double(), found.loss.sum().double(), other[1].double(), other[0].double()]
            ).cpu()
    if not count:
        raise RegardError("there is no batch to attack.")
    names = ("accuracy", "loss", "random_accuracy", "random_loss")
    columns: dict[str, Any] = {"eps": list(eps)}
    columns |= {name: (sums[:, i] / count).tolist() for i, name in enumerate(names)}
    return Table(columns, title="robustness of attention")


def _random(valid: Scores, generator: torch.Generator) -> Scores:
    """A random direction, drawn on the CPU whatever the device."""
    drawn = random_unit(tuple(m.cpu() for m in valid), generator)
    return tuple(d.to(m.device) for d, m in zip(drawn, valid, strict=True))
