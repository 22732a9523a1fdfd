"""What a block is: a mechanism that mixes positions of a layer's input without queries, keys and values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

BLOCK_LAWS = ("reference", "gradient", "causal", "batch", "precision")


class Block(nn.Module):
    """A module from x to a tensor of the same batch, with a definition and a fast path.

        reference(x)   the definition, from the paper, no tricks
        forward(x)     the same, fast

    Attributes:
        causal: whether no later position moves an earlier one; time is then dimension 1 of x and the output.
        exempt: laws that it breaks by design, and why; `BLOCK_LAWS` names them.
    """

    causal: ClassVar[bool] = False
    exempt: ClassVar[dict[str, str]] = {}

    def reference(self, x: Tensor) -> Tensor:
        """Return what `forward` must return, by definition."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def example(self, generator: torch.Generator) -> Tensor:
        """Return an input that the shared laws may try, float64, of two items."""
        raise NotImplementedError
