"""The mixer gating unit, which takes the place of the attention sublayer.

    out = (z W + b) * g,   g = v, the generator's output                 gate "raw", as published
                           g = sigmoid(v)                                gate "sigmoid"
                           g = 1: no token is mixed, nothing generated   gate "one"
    out = z W + b + v                                                    gate "add"

z is a normed x, [B, N, d], N fixed. The published gate is not squashed: it can be negative and has no bound.

Source: Abdullah and Aydin, 2024, arXiv 2403.02411, section 3. Status: "raw" agrees with the official code by
running both; the other gates are ours, for comparison.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block, Maps
from regard.attention.costs import Costs
from regard.attention.ninformer.mixing import MODES, Fourier, Generator, Grid, Mixer, generator_of
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError, ShapeMismatch

GATES = ("raw", "sigmoid", "one", "add")
FEWEST, AT_ONCE = 4, 2**21


class NiNMixer(Block):
    """The gating unit of a NiNformer, from normed tokens to what is added to the residual stream.

    Args:
        dim: d, width of a token.
        tokens: N, class tokens included; fixed.
        hidden: width inside the channel mixing of the generator.
        token_hidden: width inside its token mixing; default `hidden`.
        dropout: share dropped in training, inside the generator.
        gate: "raw", "sigmoid", "one" or "add"; see above.
        generator: "mixer", "fourier", or a function of dim and tokens that returns a module from [B, N, d] to
            the same.
        prefix: how many tokens stand before those of the plane, such as a class token.
        grid: rows and columns of the plane; default a square where that fits.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> unit = NiNMixer(32, tokens=17, hidden=64, prefix=1)
        >>> unit(torch.randn(2, 17, 32)).shape, unit.grid
        (torch.Size([2, 17, 32]), (4, 4))
    """

    def __init__(
        self, dim: int, tokens: int, hidden: int, token_hidden: int | None = None, dropout: float = 0.0,
        gate: str = "raw", generator: Generator = "mixer", prefix: int = 0, grid: Grid | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        token_hidden = hidden if token_hidden is None else token_hidden
        for name, value in (
            ("dim", dim), ("tokens", tokens), ("hidden", hidden), ("token_hidden", token_hidden)
        ):  # fmt: skip
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if gate not in GATES:
            raise RegardError(f"gate is {gate!r}; it must be one of {', '.join(GATES)}.")
        self.dim, self.tokens, self.hidden, self.token_hidden = dim, tokens, hidden, token_hidden
        self.gate, self.prefix, self.grid = gate, prefix, grid_of(tokens, prefix, grid)
        self.shows = None if gate == "one" or self.grid is None else "maps"
        self.Mixer: nn.Module | None = None
        if gate != "one":
            self.Mixer = generator_of(generator, dim, tokens, hidden, token_hidden, dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the gated tokens [B, N, dim].

        Args:
            x: normed tokens [B, N, dim].
            valid: bool [B, N], False at padding; what stands there moves no other token.

        Raises:
            ShapeMismatch: where x or valid is of another shape.
        """
        self.check(x, valid)
        return self.joined(self.proj(x), self.gates(x, valid))

    def reference(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        v, u = self.gates(x, valid), self.proj(x)
        if v is None:
            return u
        if self.gate == "add":
            return u + v
        return u * (torch.sigmoid(v) if self.gate == "sigmoid" else v)

    def gates(self, x: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """Return what the generator makes of normed tokens, [B, N, dim]; None where the gate is 1."""
        if self.Mixer is None:
            return None
        if isinstance(self.Mixer, Mixer):
            return self.Mixer(x, valid)
        v: Tensor = self.Mixer(x if valid is None else x * valid[..., None])
        if v.shape != x.shape:
            raise ShapeMismatch(
                f"the generator made {list(v.shape)} of {list(x.shape)}; it must keep the shape."
            )
        return v

    def joined(self, u: Tensor, v: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Return the two branches together, added `onto` a residual stream where there is one."""
        if v is None or self.gate == "add":
            out = u if v is None else u + v
            return out if onto is None else onto + out
        v = torch.sigmoid(v) if self.gate == "sigmoid" else v
        return u * v if onto is None else torch.addcmul(onto, u, v)

    def maps(self, x: Tensor) -> Maps:
        """Return the gate of every channel over the plane; prefix tokens are left out."""
        self.check(x)
        v = self.gates(x)
        if v is None or self.grid is None:
            raise RegardError(
                "a gate of 1 has no map." if v is None else f"{self.tokens} tokens are on no known grid."
            )
        squashed = self.gate == "sigmoid"
        v = torch.sigmoid(v) if squashed else v
        plane = v[:, self.prefix :].mT.unflatten(2, self.grid)
        return Maps(plane, "factor" if squashed else "gate", head="channel")

    def resize_tokens(self, grid: Grid, mode: str = "bicubic") -> NiNMixer:
        """Return a unit for a plane of other size, its token mixing interpolated; an extension of ours.

        The weights over tokens are interpolated in two dimensions. Those that read tokens are divided by how
        many times more there are, so that sums keep their size. Prefix tokens keep their weights.

        Args:
            grid: rows and columns of the new plane.
            mode: "bicubic", "bilinear" or "nearest".

        Raises:
            RegardError: where the present grid is not known, or the generator's tokens cannot be resized.
        """
        new = checked_grid(grid, mode)
        if self.grid is None:
            raise RegardError(f"{self.tokens} tokens are on no known grid; give grid= when building.")
        if self.Mixer is not None and not isinstance(self.Mixer, Mixer | Fourier):
            raise RegardError(f"a {type(self.Mixer).__name__} as generator cannot be resized.")
        made = copy.deepcopy(self)
        if isinstance(made.Mixer, Mixer):
            made.Mixer.resized(self.grid, new, self.prefix, mode)
        made.grid, made.tokens = new, self.prefix + math.prod(new)
        return made

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, self.tokens, self.dim, generator=generator, dtype=torch.float64)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, tokens={self.tokens}, gate={self.gate!r}"

    def check(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Refuse tokens or marks of padding that are of another shape."""
        if x.ndim != 3 or x.shape[1:] != (self.tokens, self.dim):
            raise ShapeMismatch(
                f"x must be [batch, {self.tokens} tokens, {self.dim}], as the layer was built for, and is "
                f"{list(x.shape)}; resize_tokens makes one for other sizes."
            )
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
            raise ShapeMismatch(
                f"valid must be bool {list(x.shape[:2])}, and is {valid.dtype} {list(valid.shape)}."
            )

    def at_once(self, x: Tensor, valid: Tensor | None) -> int:
        """Return how many items to compute at once, so that what is between stays in a CPU's cache."""
        kept = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()
        if kept or valid is not None:
            return max(1, len(x))
        return max(FEWEST, AT_ONCE // (max(self.tokens, self.dim) * max(self.hidden, self.token_hidden)))


def grid_of(tokens: int, prefix: Any, grid: Any) -> Grid | None:
    """Return the plane of the tokens after the prefix; None where none was given and they make no square.

    Raises:
        RegardError: where prefix and grid do not make up the tokens.
    """
    if not isinstance(prefix, int) or isinstance(prefix, bool) or not 0 <= prefix < tokens:
        raise RegardError(f"prefix is {prefix!r}; it must be a whole number from 0, below {tokens} tokens.")
    if grid is None:
        side = math.isqrt(tokens - prefix)
        return (side, side) if side**2 == tokens - prefix else None
    rows, columns = checked_grid(grid)
    if rows * columns != tokens - prefix:
        raise RegardError(f"grid {rows} x {columns} and prefix {prefix} do not make {tokens} tokens.")
    return rows, columns


def checked_grid(grid: Any, mode: str = "bicubic") -> Grid:
    """Return rows and columns of a plane.

    Raises:
        RegardError: where they are none, or the mode is no way to interpolate.
    """
    numbers = tuple(grid) if isinstance(grid, list | tuple) else ()
    if len(numbers) != 2 or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers
    ):
        raise RegardError(f"grid is {grid!r}; it must be two whole numbers from 1, rows and columns.")
    if mode not in MODES:
        raise RegardError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    return numbers[0], numbers[1]


@mechanism("ninformer-gating")
@dataclass(frozen=True, kw_only=True)
class NiNGating(Spec):
    """Tokens gated by what a small mixer makes of them: a layer for a fixed number of tokens.

    Attributes:
        dim: width of a token.
        tokens: how many, class tokens included.
        hidden, token_hidden, dropout, gate, prefix, grid: see `NiNMixer`.
        generator: "mixer" or "fourier".

    Example:
        >>> unit = NiNGating(dim=32, tokens=64, hidden=64).build()
        >>> unit(torch.randn(2, 64, 32)).shape
        torch.Size([2, 64, 32])
    """

    module: ClassVar[type[Block]] = NiNMixer
    costs: ClassVar = Costs(time="T h D", memory="h D")
    dim: int
    tokens: int
    hidden: int
    token_hidden: int | None = None
    dropout: float = 0.0
    gate: str = "raw"
    generator: str = "mixer"
    prefix: int = 0
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if isinstance(self.grid, list):
            object.__setattr__(self, "grid", tuple(self.grid))

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=8, tokens=6, hidden=12, token_hidden=5, grid=(2, 3)),
            cls(dim=8, tokens=10, hidden=12, gate="sigmoid", prefix=1),
            cls(dim=6, tokens=9, hidden=8, gate="add", generator="fourier"),
            cls(dim=6, tokens=9, hidden=8, gate="one"),
        )
