"""LightNet's layers: the mixing of positions with its projections, for text and for grids.

    q = SiLU(x W_q), k = x W_k, v = x W_v
    out = W_o (norm(heads) * SiLU(x W_1 W_2))              RMS norm over the whole width

`LightNetText` is causal and decodes from a state; `LightNetGrid` sees images, videos or texts in all
directions in one scan. Without positions a grid is a bag of tokens: `lrpe` turns queries and keys by MD-LRPE,
and `MDTPE` can stand after the embedding.

Source: Qin et al., 2024, arXiv 2405.21022. Status: agrees with flash-linear-attention's layer at
`lrpe=False, preset="fla"` (without its optional short convolution).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import CARRIES_STATE, Costs
from regard.attention.lightnet.function import Method, lightnet_attention
from regard.attention.lightnet.positions import MDLRPE, Angles, check_grid, coordinates
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError, ShapeMismatch

State = tuple[Tensor, Tensor, Tensor]
PRESETS = ("paper", "fla")


class LightNetLayer(Block):
    """The projections, the norm and the gate; `mix` is given q, k and v."""

    def __init__(
        self, dim: int, heads: int, axes: int, lrpe: bool, gate_rank: int, preset: str, eps: float
    ) -> None:
        super().__init__()
        self.heads, self.axes = heads, axes
        self.scale = (dim // heads) ** -0.5 if preset == "fla" else 1.0
        self.queries, self.keys, self.values = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gate = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False)
        )
        self.norm, self.output = nn.RMSNorm(dim, eps=eps), nn.Linear(dim, dim, bias=False)
        self.positions = MDLRPE(dim // heads, heads, axes, strict=False) if lrpe else None

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return f(q), k and v of x [B, T, dim], each [B, H, T, dim / H]."""
        if x.ndim != 3 or x.shape[-1] != self.queries.in_features:
            raise ShapeMismatch(
                f"x must be [batch, positions, {self.queries.in_features}], and is {list(x.shape)}."
            )
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        return F.silu(q), k, v

    def angles(self, places: Tensor, class_tokens: int = 0) -> Angles | None:
        """Return the cosines and sines of places [T, axes] or [B, T, axes], or None without MD-LRPE."""
        found: Angles | None = None if self.positions is None else self.positions(places, class_tokens)
        return found

    def finish(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Return the output [B, T, dim] from the heads' [B, H, T, dim / H] and x."""
        whole = self.norm(mixed.transpose(1, 2).flatten(2))
        return self.output(whole * F.silu(self.gate(x)))


class LightNetTextLayer(LightNetLayer):
    """The causal layer; the module of `LightNetText`."""

    causal = True

    def __init__(self, dim: int, heads: int, lrpe: bool, gate_rank: int, preset: str, eps: float) -> None:
        super().__init__(dim, heads, 1, lrpe, gate_rank, preset, eps)

    def forward(self, x: Tensor, valid: Tensor | None = None, method: Method = "chunk") -> Tensor:
        """Return the outputs [B, T, dim] of x [B, T, dim]; `valid` is bool [B, T], False at padding."""
        return self._run(x, None, valid, method)[0]

    def reference(self, x: Tensor) -> Tensor:
        return self._run(x, None, None, "naive")[0]

    def step(
        self, x: Tensor, state: State | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only.
            state: what this returned before: S, z and the number of positions [B]; None at the beginning.
            valid: bool [B, T], False at padding, which has no place.
        """
        if state is not None and (not isinstance(state, tuple) or len(state) != 3):
            raise ShapeMismatch("the state must be the three tensors (S, z, positions) that step returned.")
        return self._run(x, state, valid, "chunk")

    def _run(
        self, x: Tensor, state: State | None, valid: Tensor | None, method: Method
    ) -> tuple[Tensor, State]:
        q, k, v = self.parts(x)
        seen = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device) if valid is None else valid.long()
        before = seen.new_zeros(x.shape[0]) if state is None else state[2]
        places = (before[:, None] + seen.cumsum(1) - 1).clamp(min=0)
        mixed, (S, z) = lightnet_attention(
            q, k, v, causal=True, valid=valid, state=None if state is None else state[:2], scale=self.scale,
            angles=self.angles(places[..., None]), method=method,
        )  # fmt: skip
        return self.finish(mixed, x), (S, z, before + seen.sum(1))

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.queries.in_features, generator=generator, dtype=torch.float64)


class LightNetGridLayer(LightNetLayer):
    """The layer that sees a grid in all directions; the module of `LightNetGrid`."""

    def forward(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        class_tokens: int = 0,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the outputs, of the shape of x.

        Args:
            x: [B, *grid, dim]; or [B, class_tokens + prod(grid), dim] where `grid` is given.
            grid: sizes of the axes.
            class_tokens: so many tokens in front have no place on the grid.
            valid: bool [B, positions], False at padding.
        """
        flat, angles = self._laid(x, grid, class_tokens)
        q, k, v = self.parts(flat)
        mixed, _ = lightnet_attention(q, k, v, causal=False, valid=valid, scale=self.scale, angles=angles)
        return self.finish(mixed, flat).view(x.shape)

    def _laid(self, x: Tensor, grid: Sequence[int] | None, class_tokens: int) -> tuple[Tensor, Angles | None]:
        if grid is None:
            if x.ndim != self.axes + 2 or class_tokens:
                raise ShapeMismatch(
                    f"x must be [batch, {self.axes} axes, dim] where no grid is given, and is {list(x.shape)}"
                    f"{', with class tokens' if class_tokens else ''}."
                )
            x, grid = x.flatten(1, -2), x.shape[1:-1]
        check_grid(grid, self.axes, x.shape[1] - class_tokens)
        return x, self.angles(coordinates(grid, x.device), class_tokens)

    def reference(self, x: Tensor) -> Tensor:
        flat, angles = self._laid(x, None, 0)
        q, k, v = self.parts(flat)
        weights = k.softmax(2)
        if angles is not None:
            q, weights = (torch.cat([y * angles[0], y * angles[1]], -1) for y in (q, weights))
        mixed = self.scale * (q @ weights.transpose(-1, -2)) @ v
        return self.finish(mixed, flat).view(x.shape)

    def example(self, generator: torch.Generator) -> Tensor:
        grid = (5, 3, 2)[: self.axes]
        return torch.randn(2, *grid, self.queries.in_features, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class _Layer(Spec):
    dim: int
    heads: int
    lrpe: bool = True
    gate_rank: int = 128
    preset: str = "paper"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "gate_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.dim % self.heads:
            raise RegardError(f"dim is {self.dim}, which {self.heads} heads do not divide.")
        if self.preset not in PRESETS:
            raise RegardError(f"preset is {self.preset!r}; it must be one of {', '.join(PRESETS)}.")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise RegardError(f"eps is {self.eps!r}; it must be above 0.")


@mechanism("lightnet-text")
@dataclass(frozen=True, kw_only=True)
class LightNetText(_Layer):
    """LightNet for text: a causal layer from x to x that decodes from a state of fixed size.

    Attributes:
        dim: width of x.
        heads: number of heads; it divides dim.
        lrpe: whether queries and keys are turned by MD-LRPE of one axis.
        gate_rank: width between the two maps of the gate.
        preset: `paper`, scale 1, or `fla`, scale 1 / sqrt(dim / heads).
        eps: of the norm.

    Example:
        >>> layer = LightNetText(dim=32, heads=4).build()
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    module: ClassVar = LightNetTextLayer
    costs: ClassVar = CARRIES_STATE

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(dim=12, heads=3, gate_rank=4), cls(dim=8, heads=2, lrpe=False, preset="fla")


@mechanism("lightnet-grid")
@dataclass(frozen=True, kw_only=True)
class LightNetGrid(_Layer):
    """LightNet for images, videos or texts in all directions: a layer from x to x in one scan.

    Attributes:
        dim: width of x.
        heads: number of heads; it divides dim.
        axes: of the grid, 1 to 3.
        lrpe: whether queries and keys are turned by MD-LRPE.
        gate_rank: width between the two maps of the gate.
        preset: `paper`, scale 1, or `fla`, scale 1 / sqrt(dim / heads).
        eps: of the norm.

    Example:
        >>> layer = LightNetGrid(dim=32, heads=4, axes=2).build()
        >>> layer(torch.randn(2, 6, 9, 32)).shape
        torch.Size([2, 6, 9, 32])
    """

    module: ClassVar = LightNetGridLayer
    costs: ClassVar = Costs(time="T D^2", memory="D^2")
    axes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axes not in (1, 2, 3):
            raise RegardError(f"axes is {self.axes!r}; it must be 1, 2 or 3.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        grids = (cls(dim=12, heads=3, gate_rank=4, axes=axes) for axes in (1, 2, 3))
        return *grids, cls(dim=8, heads=2, lrpe=False, preset="fla")
