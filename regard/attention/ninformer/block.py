"""The NiNformer block: a gating unit and an MLP around a residual stream.

    x = x + unit(LN x)                  unit: (z W + b) * mixer(z), see `gating`
    x = x + FFN(LN x)                   the same LN, one module, unless `share_norm` is False

x is [B, N, d] with N fixed, h the hidden width and h' that over tokens:

    parameters      6 d + (d^2 + d) + (2 N h' + h' + N) + 2 (2 d h + h + d)
    multiply-adds   N d^2 + 2 N d (h' + 2 h);  attention with the same FFN has 4 N d^2 + 2 N^2 d + 2 N d h

With h' = h it is cheaper than attention only where N > 2 h - 1.5 d: with the published sizes (N 64, d 256,
h 512) above 640 tokens.

Source: Abdullah and Aydin, 2024, arXiv 2403.02411, section 3. Status: agrees with the official code by
running both. On a CPU without gradients, a batch is computed a few items at a time, which is faster.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block, Maps
from regard.attention.costs import Costs
from regard.attention.ninformer.gating import NiNGating, NiNMixer
from regard.attention.ninformer.mixing import FeedForward, Generator, Grid
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError


class NiNBlock(Block):
    """A block of a NiNformer, from [B, N, dim] to the same.

    Args:
        dim, tokens, hidden, token_hidden, dropout, gate, generator, prefix, grid: see `NiNMixer`; `hidden` is
            also the width inside the MLP, and `dropout` also of the MLP.
        share_norm: whether the gating unit and the MLP have one LayerNorm together, as published.

    Example:
        >>> block = NiNBlock(256, tokens=64, hidden=512)
        >>> sum(p.numel() for p in block.parameters())
        659264
    """

    def __init__(
        self, dim: int, tokens: int, hidden: int, token_hidden: int | None = None, dropout: float = 0.0,
        share_norm: bool = True, gate: str = "raw", generator: Generator = "mixer", prefix: int = 0,
        grid: Grid | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        unit = NiNMixer(dim, tokens, hidden, token_hidden, dropout, gate, generator, prefix, grid)
        self.share_norm, self.shows = share_norm, unit.shows
        self.norm = nn.LayerNorm(dim)
        self.norm2 = None if share_norm else nn.LayerNorm(dim)
        self.mgu, self.ffn = unit, FeedForward(dim, hidden, dropout)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the outputs of tokens x [B, N, dim].

        Args:
            valid: bool [B, N], False at padding; what stands there moves no other token.

        Raises:
            ShapeMismatch: where x or valid is of another shape.
        """
        self.mgu.check(x, valid)
        few = self.mgu.at_once(x, valid)
        if few >= len(x) or self._hooked():
            return self._mixed(x, valid)
        return torch.cat([self._mixed(part) for part in x.split(few)])

    def reference(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x + self.mgu.reference(self.norm(x), valid)
        out: Tensor = x + self.ffn((self.norm2 or self.norm)(x))
        return out

    def maps(self, x: Tensor) -> Maps:
        """Return the gate of every channel over the plane; prefix tokens are left out."""
        self.mgu.check(x)
        return self.mgu.maps(self.norm(x))

    def resize_tokens(self, grid: Grid, mode: str = "bicubic") -> NiNBlock:
        """Return a block for a plane of other size; see `NiNMixer.resize_tokens`."""
        made = copy.deepcopy(self)
        made.mgu = self.mgu.resize_tokens(grid, mode)
        return made

    def example(self, generator: torch.Generator) -> Tensor:
        return self.mgu.example(generator)

    def _mixed(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        x = self.mgu.joined(self.mgu.proj(z), self.mgu.gates(z, valid), onto=x)
        out: Tensor = x + self.ffn((self.norm2 or self.norm)(x))
        return out

    def _hooked(self) -> bool:
        """Whether somebody watches a part, and should see a batch in one piece."""
        return any(
            part._forward_hooks or part._forward_pre_hooks for part in self.modules() if part is not self
        )


@mechanism("ninformer")
@dataclass(frozen=True, kw_only=True)
class NiN(NiNGating):
    """A NiNformer block, gating unit and MLP, for a fixed number of tokens.

    Attributes:
        dim, tokens, hidden, token_hidden, dropout, gate, generator, prefix, grid: see `NiNMixer`.
        share_norm: whether both sublayers have one LayerNorm together, as published.

    Example:
        >>> block = NiN(dim=32, tokens=64, hidden=64).build()
        >>> block(torch.randn(2, 64, 32)).shape
        torch.Size([2, 64, 32])
    """

    module: ClassVar[type[Block]] = NiNBlock
    costs: ClassVar = Costs(time="T h D", memory="(T + D) h")
    share_norm: bool = True

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=8, tokens=6, hidden=12, token_hidden=5, grid=(2, 3)),
            cls(dim=8, tokens=10, hidden=12, gate="sigmoid", prefix=1, share_norm=False),
            cls(dim=6, tokens=9, hidden=8, gate="add", generator="fourier"),
            cls(dim=6, tokens=9, hidden=8, gate="one"),
        )


def count_parameters(dim: int, tokens: int, hidden: int, token_hidden: int | None = None) -> int:
    """Return how many parameters a block has, norm shared, by the formula.

    Example:
        >>> count_parameters(256, 64, 512), 4 * count_parameters(256, 64, 512)
        (659264, 2637056)
    """
    over = hidden if token_hidden is None else token_hidden
    gating = dim**2 + dim + 2 * tokens * over + over + tokens
    return 6 * dim + gating + 2 * (2 * dim * hidden + hidden + dim)


def cheaper_from(dim: int, hidden: int) -> float:
    """Return the number of tokens above which a block costs less than attention with the same MLP.

    N > 2 h - 1.5 d, by multiply-adds, h also over tokens; time on a machine is another matter.

    Example:
        >>> cheaper_from(256, 512)
        640.0
    """
    for name, value in (("dim", dim), ("hidden", hidden)):
        if not isinstance(value, int) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    return 2 * hidden - 1.5 * dim
