"""Stochastic depth: in training a branch is left out of some samples, and scaled up in the others.

    out = x keep / (1 - rate),   keep ~ Bernoulli(1 - rate), one a sample;   out = x in evaluation

Source: Huang et al., 2016, arXiv 1603.09382; rates that rise with depth as in its section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regard.errors import RegardError


class DropPath(nn.Module):
    """Stochastic depth of one branch.

    Args:
        rate: share of samples that go without it in training, from 0 to below 1.

    Example:
        >>> branch = DropPath(0.5).eval()
        >>> bool((branch(torch.ones(4, 2)) == 1).all())
        True
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise RegardError(f"the rate of DropPath is {rate!r}; it must be from 0 to below 1.")
        self.rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, ...], or in training some of its samples scaled and the others 0."""
        if not self.training or not self.rate:
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def drop_rates(highest: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rate of each layer of each stage, which rises evenly from 0 to the highest.

    Args:
        highest: of the last layer.
        depths: layers of each stage.

    Example:
        >>> drop_rates(0.3, [1, 3])
        [[0.0], [0.1, 0.2, 0.3]]
    """
    steps = max(1, sum(depths) - 1)
    rates = iter([round(highest * i / steps, 12) for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]
