"""Attention of all positions of a map to all, with LePE: the last stage of BiFormer.

    q, k, v = x W_qkv,  split as (3, heads, dim / heads)
    out = W_o (softmax(scale q k^T) v + LePE(x)) + b        LePE: depthwise 5 x 5 convolution, with bias

Maps are channels-last, [B, H, W, dim]. Unlike `BRA`, the scale is by the width of a head, q, k and v have no
bias, and LePE is of the input.

Source: rayleizhu/BiFormer, models/_common.py. Status: agrees with the official code by running both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block, Grid, chosen_queries
from regard.errors import RegardError, ShapeMismatch


class LePEAttention(Block):
    """A layer of attention to the whole plane, with a depthwise convolution beside it.

    Args:
        dim: width of x.
        heads: number of heads; it divides dim.
        lepe: width of the convolution, odd.
        scale: factor on q k^T; default 1 / sqrt(dim / heads).
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> LePEAttention(32, 4)(torch.randn(2, 7, 5, 32)).shape
        torch.Size([2, 7, 5, 32])
    """

    shows = "rows"

    def __init__(
        self, dim: int, heads: int = 8, lepe: int = 5, scale: float | None = None, *, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise RegardError(f"dim is {dim}, which {heads} heads do not divide.")
        if lepe < 1 or not lepe % 2:
            raise RegardError(f"lepe is {lepe!r}; it must be an odd number.")
        self.dim, self.heads = dim, heads
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        made = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.lepe = nn.Conv2d(dim, dim, lepe, padding=lepe // 2, groups=dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of x [B, H, W, dim], of its shape."""
        q, k, v = self._parts(x)
        return self._closed(F.scaled_dot_product_attention(q, k, v, scale=self.scale), x)

    def reference(self, x: Tensor) -> Tensor:
        q, k, v = self._parts(x)
        return self._closed((q @ k.mT * self.scale).softmax(-1) @ v, x)

    def grids(self, x: Tensor) -> tuple[Grid, Grid]:
        """Return height and width of x, twice: queries and keys share the plane."""
        self._check(x)
        return (x.shape[1], x.shape[2]), (x.shape[1], x.shape[2])

    def rows(self, x: Tensor, queries: Tensor | Sequence[int]) -> Tensor:
        """Return the weights of chosen queries over all positions, [B, heads, Q, H W].

        Example:
            >>> LePEAttention(32, 4).rows(torch.randn(2, 7, 5, 32), [0, 34]).shape
            torch.Size([2, 4, 2, 35])
        """
        chosen = chosen_queries(queries, self.grids(x)[0]).to(x.device)
        q, k, _ = self._parts(x)
        return (q[:, :, chosen] @ k.mT * self.scale).softmax(-1)

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 5, 6, self.dim, generator=generator, dtype=torch.float64)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x)
        parts = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return q, k, v

    def _closed(self, out: Tensor, x: Tensor) -> Tensor:
        beside = self.lepe(x.movedim(-1, 1)).movedim(1, -1)
        found: Tensor = self.proj(out.transpose(1, 2).reshape(x.shape) + beside)
        return found

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[-1] != self.dim or not all(x.shape[1:]):
            raise ShapeMismatch(f"x is {list(x.shape)}; it must be [batch, height, width, {self.dim}].")
