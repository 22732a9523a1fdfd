"""The same statistics from whole attention matrices, as other tools leave them to their user.

    entropy   mean over rows of -sum_j A_ij log A_ij
    mass      sum over rows of A_ij, over how many rows can see the key j
    previous  mean over rows i >= 1 of A_{i, i-1}
    distance  sum_ij A_ij (i - j) / sum_ij A_ij

It needs nothing of regard, so that another tool's own environment can run it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def statistics(weights: Tensor) -> dict[str, Tensor]:
    """Return the statistics of one layer's causal weights [1, H, T, T]; [H] each, `mass` [H, T]."""
    rows = weights.shape[2]
    position = torch.arange(rows, dtype=weights.dtype)
    mass = weights.sum(2)[0]
    back = weights.sum(3)[0] @ position - mass @ position
    return {
        "entropy": torch.special.entr(weights).sum(-1).mean(2)[0],
        "mass": mass / (rows - position),
        "previous": weights.diagonal(-1, 2, 3).mean(2)[0],
        "distance": back / rows,
    }


def stacked(layers: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return the statistics of all layers, [L, H] or [L, H, T], as float64."""
    return {name: torch.stack([layer[name] for layer in layers]).double() for name in layers[0]}
