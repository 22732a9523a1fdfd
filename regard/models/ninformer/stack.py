"""A stack of NiNformer blocks, named as the official module. Status: agrees with it by running both."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from regard.attention.ninformer import NiNBlock
from regard.errors import RegardError


class NiNformer(nn.Module):
    """Blocks one after another, from [B, N, dim] to the same; no norm at the end.

    Args:
        depth: how many blocks.
        dim, tokens, hidden: see `NiNBlock`.
        options: further ones of `NiNBlock`.

    Example:
        >>> import torch
        >>> model = NiNformer(2, 32, tokens=16, hidden=64)
        >>> model(torch.randn(3, 16, 32)).shape
        torch.Size([3, 16, 32])
    """

    def __init__(self, depth: int, dim: int, tokens: int, hidden: int, **options: Any) -> None:
        super().__init__()
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise RegardError(f"depth is {depth!r}; it must be a whole number from 1.")
        self.model = nn.Sequential(*(NiNBlock(dim, tokens, hidden, **options) for _ in range(depth)))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the outputs of tokens x [B, N, dim]; `valid` is bool [B, N], False at padding."""
        for block in self.model:
            x = block(x, valid)
        return x

    def resize_tokens(self, grid: tuple[int, int], mode: str = "bicubic") -> NiNformer:
        """Return a stack for a plane of other size, an extension; see `NiNMixer.resize_tokens`."""
        made = copy.deepcopy(self)
        made.model = resized(self.model, grid, mode)
        return made


def resized(blocks: nn.Sequential, grid: tuple[int, int], mode: str) -> nn.Sequential:
    """Return blocks for a plane of other size."""
    return nn.Sequential(*(b.resize_tokens(grid, mode) for b in blocks if isinstance(b, NiNBlock)))
