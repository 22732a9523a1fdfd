"""Training small image classifiers in studies: one loop, on batches that a function draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def trained(
    model: nn.Module, batch: Callable[[], Batch], steps: int, rate: float, tick: Callable[[float], None]
) -> nn.Module:
    """Train with AdamW at a rate that rises and falls, and return the model in evaluation.

    Args:
        model: of images, to logits or to an output that has them.
        batch: draws images [B, C, H, W] and labels int64 [B].
        steps: of training.
        rate: the highest.
        tick: is told the share of steps done.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        images, labels = batch()
        loss = F.cross_entropy(logits_of(model, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        tick((step + 1) / steps)
    return model.eval()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits [B, classes]."""
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits


def right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are labelled rightly."""
    with torch.no_grad():
        found = torch.cat([logits_of(model, part).argmax(1) for part in images.split(64)])
    return float((found == labels).double().mean())
