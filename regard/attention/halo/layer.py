"""Halo attention with its projections, channels first, as it stands in the place of a 3 x 3 convolution.

    q = W_q x;  [k, v] = W_kv x of each head                [B, C, H, W], 1 x 1 convolutions
    out = halo_attention(q, k, v)                           [B, dim_out, H / stride, W / stride]

Source: Vaswani et al., 2021, arXiv 2103.12731, section 2; parameters have the names of timm's HaloAttn.
Status: agrees with timm 1.0.31 by running both, outputs and gradients to 1e-6, with `rel_stride=1`; with it
left out, rows of the tables are true offsets at stride 2 as well, which timm's are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block, chosen_queries
from regard.attention.costs import Costs
from regard.attention.halo.function import halo_attention
from regard.attention.halo.looked import weights_of
from regard.attention.halo.rules import MOST_AXES, Numbers, axes_of, options_of
from regard.attention.registry import Spec, mechanism
from regard.engines.grids import Axis
from regard.errors import RegardError, ShapeMismatch

TABLES = ("depth_rel", "height_rel", "width_rel")


class RelativeTables(nn.Module):
    """A table of relative positions an axis, [2 w - 1, width]: `height_rel` and `width_rel` of a plane."""

    def __init__(self, kernels: Sequence[int], width: int, **made: Any) -> None:
        super().__init__()
        self.names = TABLES[-len(kernels) :]
        for name, kernel in zip(self.names, kernels, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(2 * kernel - 1, width, **made)))

    def tables(self) -> tuple[Tensor, ...]:
        """Return them, one an axis."""
        return tuple(getattr(self, name) for name in self.names)


class HaloAttention(Block):
    """A layer of halo attention, [B, dim, H, W] to [B, dim_out, H / stride, W / stride].

    Args:
        dim: channels of x.
        dim_out: channels of the output, of values in all heads together; by default as `dim`.
        heads: number of heads; it divides `dim_out`.
        block, halo: b and h, of all axes or of each; see `halo_attention`.
        dim_head: width of a query and key; by default `dim_out` over `heads`, with `dim_out` rounded to 8.
        stride: 1 or 2; 2 makes the map half as high and wide.
        rel_stride: how far queries that follow each other are apart in the tables; by default the stride.
            timm's weights of strided layers need 1.
        border: "zero", padding takes weight as in timm, or "mask".
        pad: "error", or "auto" for maps that blocks do not divide.
        relative: whether there are tables of relative positions, without which a window has no directions.
        scale_rel: whether their scores are scaled like the others.
        average: with stride 2, whether every query is computed, and their outputs averaged 2 x 2, or as many
            as there are at the end of an odd map; odd blocks need it.
        axes: of the map, 1 to 3.
        is_causal: of one axis: no key after the query, and a halo before the block alone.
        bias: whether the projections have a bias.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = HaloAttention(64, heads=4, block=8, halo=3)
        >>> layer(torch.randn(2, 64, 16, 24)).shape
        torch.Size([2, 64, 16, 24])
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, heads: int = 8, block: Numbers = 8, halo: Numbers = 3, *,
        dim_head: int | None = None, stride: int = 1, rel_stride: int | None = None, border: str = "zero",
        pad: str = "error", relative: bool = True, scale_rel: bool = False, average: bool = False,
        axes: int = 2, is_causal: bool = False, bias: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        every = 1 if average else stride
        self.options = _checked(
            dim, dim_out, heads, dim_head, axes, block, halo, border, stride, every, rel_stride, pad,
            is_causal,
        )  # fmt: skip
        self.dim, self.dim_out, self.heads, self.axes = dim, dim_out, heads, axes
        self.dim_head = dim_head or _rounded(dim_out) // heads
        self.stride, self.every, self.rel_stride = stride, every, rel_stride or every
        self.border, self.pad, self.is_causal, self.scale_rel = border, pad, is_causal, scale_rel
        self.scale = self.dim_head**-0.5
        self.shows = "rows" if axes == 2 else None
        made, conv = {"device": device, "dtype": dtype}, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.q = conv(dim, heads * self.dim_head, 1, stride=every, bias=bias, **made)
        self.kv = conv(dim, heads * self.dim_head + dim_out, 1, bias=bias, **made)
        kernels = [b + (1 if is_causal else 2) * h for b, h in self.options]
        self.pos_embed = RelativeTables(kernels, self.dim_head, **made) if relative else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: truncated normal, of deviation dim^-1/2, and of the tables dim_head^-1/2."""
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=self.dim**-0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for table in self._tables():
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of x [B, dim, H, W].

        Raises:
            ShapeMismatch: where x is of other axes or width, or blocks do not divide the map.
        """
        self._rules(x)
        if self.every == 1:
            q, k, v = self._projected(x, self._weights(0, 1, 2))
        else:
            few: Any = (..., *[slice(None, None, self.every)] * self.axes)
            (q,), (k, v) = self._projected(x[few], self._weights(0)), self._projected(x, self._weights(1, 2))
        return self._attend(q, k, v, "windows")

    def reference(self, x: Tensor) -> Tensor:
        self._rules(x)
        return self._attend(*self._parts(x), "dense")

    def rows(self, x: Tensor, queries: Tensor | Sequence[int]) -> Tensor:
        if self.shows is None:
            return super().rows(x, queries)
        axes, (grid, _) = self._rules(x), self.grids(x)
        chosen = chosen_queries(queries, grid).to(x.device)
        q, k, _ = self._parts(x)
        tables = self._scaled_tables()
        return weights_of(q, k, axes, self.scale, tables, self.every, self.rel_stride, chosen)

    def grids(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.shows is None:
            return super().grids(x)
        height, width = x.shape[2:]
        return (-(-height // self.every), -(-width // self.every)), (height, width)

    def multiply_adds(self, x: Tensor) -> int:
        """Return the multiply-adds for x, of whole windows and whole tables: what the algorithm asks."""
        keys = math.prod(x.shape[2:])
        queries = math.prod(-(-n // self.every) for n in x.shape[2:])
        window = math.prod(b + (1 if self.is_causal else 2) * h for b, h in self.options)
        seen = window * (self.dim_head * self.heads + self.dim_out)
        placed = sum(len(table) for table in self._tables()) * self.dim_head * self.heads
        projected = queries * self.q.out_channels + keys * self.kv.out_channels
        return int(x.shape[0] * (projected * self.dim + queries * (seen + placed)))

    def extra_repr(self) -> str:
        blocks, halos = ([option[i] for option in self.options] for i in (0, 1))
        told = f"dim={self.dim}, dim_out={self.dim_out}, heads={self.heads}, block={blocks}, halo={halos}"
        return f"{told}, stride={self.stride}, border={self.border!r}, pad={self.pad!r}"

    def example(self, generator: torch.Generator) -> Tensor:
        grid = [2 * b for b, _ in self.options]
        if self.pad == "auto":
            grid[0] -= 1
        return torch.randn(2, self.dim, *grid, generator=generator, dtype=torch.float64)

    def _rules(self, x: Tensor) -> tuple[Axis, ...]:
        if x.ndim != self.axes + 2 or x.shape[1] != self.dim or not all(x.shape[2:]):
            raise ShapeMismatch(f"x must be [batch, {self.dim}, {self.axes} axes], and is {list(x.shape)}.")
        return axes_of(x.shape[2:], self.options, self.border, self.pad, self.is_causal)

    def _tables(self) -> tuple[Tensor, ...]:
        return () if self.pos_embed is None else self.pos_embed.tables()

    def _scaled_tables(self) -> tuple[Tensor, ...]:
        return tuple(table * self.scale for table in self._tables()) if self.scale_rel else self._tables()

    def _weights(self, *which: int) -> list[tuple[Tensor, Tensor | None]]:
        """Weights and biases of q, k and v, heads one after another."""
        widths = [self.dim_head, self.dim_out // self.heads]
        k, v = self.kv.weight.flatten(1).unflatten(0, (self.heads, -1)).split(widths, 1)
        weights = [self.q.weight.flatten(1), k.flatten(0, 1), v.flatten(0, 1)]
        biases: list[Tensor | None] = [self.q.bias, None, None]
        if self.kv.bias is not None:
            biases[1:] = [b.flatten() for b in self.kv.bias.unflatten(0, (self.heads, -1)).split(widths, 1)]
        return [(weights[i], biases[i]) for i in which]

    def _projected(self, x: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """x [B, C, H, W] by several weights in one product, each [B, H, W, heads, width]."""
        weight = torch.cat([w for w, _ in weights])
        biases = [b for _, b in weights if b is not None]
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        found = F.linear(rows, weight, torch.cat(biases) if biases else None)
        parts = found.unflatten(0, (len(x), *x.shape[2:])).split([len(w) for w, _ in weights], -1)
        return [part.unflatten(-1, (self.heads, -1)) for part in parts]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v by the convolutions, [B, H, W, heads, width]."""
        q = self.q(x).unflatten(1, (self.heads, -1)).movedim((1, 2), (-2, -1))
        both = self.kv(x).unflatten(1, (self.heads, -1)).movedim((1, 2), (-2, -1))
        k, v = both.split([self.dim_head, self.dim_out // self.heads], -1)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        blocks, halos = zip(*self.options, strict=True)
        out = halo_attention(
            q, k, v, blocks, halos, self._scaled_tables() or None, self.border, self.every,
            rel_stride=self.rel_stride, scale=self.scale, pad=self.pad, is_causal=self.is_causal, impl=impl,
        )  # fmt: skip
        out = out.movedim((-2, -1), (1, 2)).flatten(1, 2)
        if self.stride == self.every:
            return out
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[self.axes - 1]
        averaged: Tensor = pool(out, 2, ceil_mode=True)
        return averaged


def _rounded(width: int) -> int:
    """The multiple of 8 that is nearest to a width, and no less than nine tenths of it, as timm has it."""
    near = max(8, (width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


def _checked(
    dim: Any, dim_out: Any, heads: Any, dim_head: Any, axes: Any, block: Any, halo: Any, border: Any,
    stride: Any, every: Any, rel_stride: Any, pad: Any, is_causal: Any,
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    if axes not in range(1, MOST_AXES + 1):
        raise RegardError(f"axes is {axes!r}; it must be 1, 2 or 3.")
    numbers = (("dim", dim), ("dim_out", dim_out), ("heads", heads), ("dim_head", dim_head))
    for name, value in numbers:
        if value is None and name == "dim_head":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if dim_out % heads:
        raise RegardError(f"dim_out is {dim_out}, which {heads} heads do not divide.")
    options_of(axes, block, halo, border, 1, rel_stride, pad, is_causal and stride == 1)
    if stride not in (1, 2) or isinstance(stride, bool):
        raise RegardError(f"stride is {stride!r}; it must be one of 1, 2.")
    return options_of(axes, block, halo, border, every, rel_stride, pad, is_causal)


@mechanism("halo-grid")
@dataclass(frozen=True, kw_only=True)
class HaloGrid(Spec):
    """Attention of blocks of a map to the block and a halo around it: a layer of maps, channels first.

    Attributes:
        dim, dim_out: channels of x and of the output.
        heads: number of heads; it divides dim_out.
        block, halo: of all axes or of each.
        dim_head, stride, rel_stride, border, pad, relative, average, axes, is_causal: see `HaloAttention`.

    Example:
        >>> layer = HaloGrid(dim=32, heads=4, block=4, halo=2, stride=2).build()
        >>> layer(torch.randn(2, 32, 16, 12)).shape
        torch.Size([2, 32, 8, 6])
    """

    module: ClassVar = HaloAttention
    costs: ClassVar = Costs(time="T (b + 2h)^axes D", memory="T D ((b + 2h) / b)^axes")
    dim: int
    heads: int
    block: Numbers
    halo: Numbers
    dim_out: int | None = None
    dim_head: int | None = None
    stride: int = 1
    rel_stride: int | None = None
    border: str = "zero"
    pad: str = "error"
    relative: bool = True
    average: bool = False
    axes: int = 2
    is_causal: bool = False

    def __post_init__(self) -> None:
        for name in ("block", "halo"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        dim_out, every = self.dim_out or self.dim, 1 if self.average else self.stride
        _checked(
            self.dim, dim_out, self.heads, self.dim_head, self.axes, self.block, self.halo, self.border,
            self.stride, every, self.rel_stride, self.pad, self.is_causal,
        )  # fmt: skip

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=8, heads=2, block=(4, 2), halo=(1, 2), dim_out=12),
            cls(dim=8, heads=2, block=4, halo=1, stride=2, border="mask", pad="auto"),
            cls(dim=6, heads=2, block=3, halo=1, stride=2, average=True, relative=False),
            cls(dim=8, heads=2, block=3, halo=2, axes=1, is_causal=True, border="mask", pad="auto"),
        )
