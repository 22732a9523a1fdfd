"""Neighbourhood attention with its projections, from x to x on a grid of 1 to 3 axes.

    q, k, v = x W_qkv + b,  split as (3, heads, dim / heads)
    out = dropout(W_o na(q, k, v) + b)

Source: Hassani et al., 2023, arXiv 2204.07143, section 3; parameters have the names of natten's modules.
Status: agrees with the official code, `rpb` with that of its versions up to 0.17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block, Grid, chosen_queries
from regard.attention.costs import Costs
from regard.attention.neighborhood.function import attend_grid
from regard.attention.neighborhood.heads import attend_last
from regard.attention.neighborhood.rows import weights_of
from regard.attention.neighborhood.rules import Flags, Numbers, axes_of, options_of
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError, ShapeMismatch

State = tuple[Tensor, Tensor]


class NeighborhoodAttention(Block):
    """A layer of neighbourhood attention; the module of `NeighborhoodGrid`.

    Args:
        dim: width of x.
        heads: number of heads; it divides dim.
        kernel_size, stride, dilation, is_causal: one for all axes or one for each; see `na1d`.
        axes: of the grid, 1 to 3.
        position_bias: whether there is a table `rpb` of biases by relative position.
        qkv_bias: whether the first projection has a bias.
        scale: factor on q k^T; default 1 / sqrt(dim / heads).
        dropout: share of the output that is dropped in training.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = NeighborhoodAttention(32, 4, kernel_size=(5, 3), axes=2)
        >>> layer(torch.randn(2, 9, 6, 32)).shape
        torch.Size([2, 9, 6, 32])
    """

    def __init__(
        self, dim: int, heads: int, kernel_size: Numbers, axes: int = 2, stride: Numbers = 1,
        dilation: Numbers = 1, is_causal: Flags = False, position_bias: bool = False, qkv_bias: bool = True,
        scale: float | None = None, dropout: float = 0.0, *, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = _checked(dim, heads, kernel_size, axes, stride, dilation, is_causal, position_bias)
        self.dim, self.heads, self.axes = dim, heads, axes
        self.shows = "rows" if axes == 2 else None
        self.given = (kernel_size, stride, dilation, is_causal)
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        made = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.proj = nn.Linear(dim, dim, **made)
        self.drop = nn.Dropout(dropout)
        self.rpb: nn.Parameter | None = None
        if position_bias:
            sizes = (2 * kernel - 1 for kernel, *_ in self.options)
            self.rpb = nn.Parameter(torch.empty(heads, *sizes, **made))
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of x [B, X1.., dim], of its shape.

        Raises:
            ShapeMismatch: where x is of other axes or width.
            RegardError: where the grid is smaller than the window.
        """
        return self._run(x, "tiles")

    def reference(self, x: Tensor) -> Tensor:
        return self._run(x, "dense")

    def grids(self, x: Tensor) -> tuple[Grid, Grid]:
        """Return height and width of x [B, H, W, dim], twice: queries and keys share the plane."""
        if self.axes != 2:
            return super().grids(x)
        self._check(x)
        return (x.shape[1], x.shape[2]), (x.shape[1], x.shape[2])

    def rows(self, x: Tensor, queries: Tensor | Sequence[int]) -> Tensor:
        """Return the weights of chosen queries over all positions, [B, heads, Q, H W]; far ones have 0.

        Example:
            >>> layer = NeighborhoodAttention(32, 4, kernel_size=3)
            >>> rows = layer.rows(torch.randn(2, 9, 6, 32), [0, 53])
            >>> rows.shape, rows.gt(0).sum(-1).unique().tolist()
            (torch.Size([2, 4, 2, 54]), [9])
        """
        grid, _ = self.grids(x)
        chosen = chosen_queries(queries, grid).to(x.device)
        q, k, _ = (part.flatten(1, -3).transpose(1, 2) for part in self._parts(x))
        return weights_of(q, k, axes_of(grid, *self.given), chosen, scale=self.scale, bias=self.rpb)

    def multiply_adds(self, x: Tensor) -> int:
        """Return how many a forward of x [B, X1.., dim] needs, in attention those of visible keys alone."""
        positions = math.prod(x.shape[:-1])
        pairs = math.prod(int(axis.visible().sum()) for axis in axes_of(x.shape[1:-1], *self.given))
        return 4 * positions * self.dim**2 + 2 * len(x) * pairs * self.dim

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim] of a causal sequence, and the state after them.

        Args:
            x: the new positions only.
            state: what this returned before: the keys and values [B, H, (kernel_size - 1) dilation, dim / H]
                that later positions can see, fewer at the beginning; None there.

        Raises:
            RegardError: where the layer is not causal along one axis, or has a stride, with which the window
                of a position depends on how many come after it.
        """
        kernel, stride, dilation, causal = self.options[0]
        if self.axes != 1 or not causal or stride != 1:
            raise RegardError("only a causal layer of one axis with stride 1 can decode step by step.")
        self._check(x)
        q, k, v = (part.transpose(1, 2) for part in self._parts(x))
        if state is not None:
            if state[0].shape[0] != x.shape[0]:
                raise ShapeMismatch(f"the state is of {state[0].shape[0]} sequences, and x of {x.shape[0]}.")
            k, v = (torch.cat([old, new], 2) for old, new in zip(state, (k, v), strict=True))
        out = attend_last(q, k, v, kernel, dilation, self.scale)
        reach = min(k.shape[2], (kernel - 1) * dilation)
        kept = (k[:, :, k.shape[2] - reach :], v[:, :, v.shape[2] - reach :])
        return self._closed(out.transpose(1, 2)), kept

    def extra_repr(self) -> str:
        kernel, stride, dilation, causal = self.given
        told = f"dim={self.dim}, heads={self.heads}, kernel_size={kernel}, stride={stride}"
        return f"{told}, dilation={dilation}, is_causal={causal}"

    def example(self, generator: torch.Generator) -> Tensor:
        grid = [kernel * dilation + 2 for kernel, _, dilation, _ in self.options]
        return torch.randn(2, *grid, self.dim, generator=generator, dtype=torch.float64)

    def _run(self, x: Tensor, impl: str) -> Tensor:
        self._check(x)
        axes = axes_of(x.shape[1:-1], *self.given)
        out, _ = attend_grid(*self._parts(x), axes, scale=self.scale, bias=self.rpb, impl=impl)
        return self._closed(out)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def _closed(self, out: Tensor) -> Tensor:
        found: Tensor = self.drop(self.proj(out.flatten(-2)))
        return found

    def _check(self, x: Tensor) -> None:
        if x.ndim != self.axes + 2 or x.shape[-1] != self.dim:
            raise ShapeMismatch(f"x must be [batch, {self.axes} axes, {self.dim}], and is {list(x.shape)}.")


def _checked(
    dim: Any, heads: Any, kernel: Any, axes: Any, stride: Any, dilation: Any, causal: Any, bias: bool
) -> tuple[tuple[int, int, int, bool], ...]:
    for name, value in (("dim", dim), ("heads", heads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if dim % heads:
        raise RegardError(f"dim is {dim}, which {heads} heads do not divide.")
    if axes not in (1, 2, 3):
        raise RegardError(f"axes is {axes!r}; it must be 1, 2 or 3.")
    options = options_of(axes, kernel, stride, dilation, causal)
    if bias and any(order for *_, order in options):
        raise RegardError("position_bias was given with is_causal; the bias is not defined in causal order.")
    return options


@mechanism("neighborhood-grid")
@dataclass(frozen=True, kw_only=True)
class NeighborhoodGrid(Spec):
    """Neighbourhood attention on a grid of 1 to 3 axes: a layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of heads; it divides dim.
        kernel_size, stride, dilation, is_causal: one for all axes or one for each; see `na1d`.
        axes: of the grid, 1 to 3.
        position_bias: whether there is a table of biases by relative position.

    Example:
        >>> layer = NeighborhoodGrid(dim=32, heads=4, kernel_size=7, dilation=(2, 1)).build()
        >>> layer(torch.randn(2, 14, 9, 32)).shape
        torch.Size([2, 14, 9, 32])
    """

    module: ClassVar = NeighborhoodAttention
    costs: ClassVar = Costs(time="T k^axes D", memory="T D")
    dim: int
    heads: int
    kernel_size: Numbers
    axes: int = 2
    stride: Numbers = 1
    dilation: Numbers = 1
    is_causal: Flags = False
    position_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation", "is_causal"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _checked(
            self.dim, self.heads, self.kernel_size, self.axes, self.stride, self.dilation, self.is_causal,
            self.position_bias,
        )  # fmt: skip

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=12, heads=3, kernel_size=4, axes=1, dilation=2, is_causal=True),
            cls(dim=8, heads=2, kernel_size=(5, 3), position_bias=True),
            cls(
                dim=8,
                heads=2,
                kernel_size=(3, 2, 3),
                axes=3,
                stride=(2, 1, 1),
                is_causal=(True, False, False),
            ),
        )
