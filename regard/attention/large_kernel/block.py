"""A block of the visual attention network: gated attention and an MLP around a map x [B, dim, X1..].

    y = BN1(x);  x = x + s1 (P2 lka(gelu(P1 y)) + y)        P1, P2: 1 x 1 convolutions
    x = x + s2 mlp(BN2(x))                                  s1, s2: one number a channel, at first 0.01

The inner residual adds y, the normed map. Fresh convolutions are normal, of variance 2 / fan-out.

Source: Guo et al., 2022, arXiv 2202.09741, section 3.2. Status: agrees with the official code by running
both, parameters have its names. On a CPU maps of two axes are computed, and returned, with channels last in
memory; in evaluation without gradients, few items and inner channels at a time, so that they stay in caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block, Maps
from regard.attention.checks import check_statistics
from regard.attention.costs import Costs
from regard.attention.large_kernel.layer import (
    CONVOLUTION_MODULES,
    LargeKernelAttention,
    check_map,
    check_sizes,
    overflows,
)
from regard.attention.large_kernel.mlp import ROOM, ConvMLP, at_rest
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class GatedAttention(nn.Module):
    """Large-kernel attention between two 1 x 1 convolutions, and around it the inner residual."""

    def __init__(self, dim: int, kernel: int, dilation: int, axes: int, **made: Any) -> None:
        super().__init__()
        convolution: Any = CONVOLUTION_MODULES[axes]
        self.proj_1 = convolution(dim, dim, 1, **made)
        self.spatial_gating_unit = LargeKernelAttention(dim, kernel, dilation, axes, **made)
        self.proj_2 = convolution(dim, dim, 1, **made)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.spatial_gating_unit(self.entered(x))
        if overflows(x):
            with torch.autocast(x.device.type, enabled=False):
                return x + self.proj_2(gated)
        out: Tensor = self.proj_2(gated) + x
        return out

    def reference(self, x: Tensor) -> Tensor:
        """Return the output as it is written."""
        out: Tensor = self.proj_2(self.spatial_gating_unit.reference(self.entered(x))) + x
        return out

    def entered(self, x: Tensor) -> Tensor:
        """Return what large-kernel attention is given."""
        return F.gelu(self.proj_1(x))


class LKABlock(Block):
    """A block of the visual attention network; the module of `LKALayer`.

    Args:
        dim: channels of x.
        mlp_ratio: inner channels of the MLP over `dim`.
        kernel, dilation: see `LargeKernelAttention`.
        axes: of the map, 1 to 3.
        layer_scale: what s1 and s2 begin with.
        dropout: share of numbers that the MLP drops in training.
        drop_path: what both branches go through before they are added, such as stochastic depth, which must
            change nothing in evaluation; None for nothing.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> block = LKABlock(16, mlp_ratio=2.0).eval()
        >>> block(torch.randn(2, 16, 14, 14)).shape, block.maps(torch.randn(1, 16, 14, 14)).kind
        (torch.Size([2, 16, 14, 14]), 'gate')
    """

    exempt: ClassVar = {"batch": "batch normalisation in training takes mean and variance over the batch"}

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, kernel: int = 21, dilation: int = 3, axes: int = 2,
        layer_scale: float = 0.01, dropout: float = 0.0, drop_path: nn.Module | None = None, *,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(dim, kernel, dilation, axes, mlp_ratio)
        self.dim, self.axes = dim, axes
        self.shows = "maps" if axes == 2 else None
        made = {"device": device, "dtype": dtype}
        self.norm1, self.norm2 = (NORMS[axes](dim, **made) for _ in range(2))
        self.attn = GatedAttention(dim, kernel, dilation, axes, **made)
        self.drop_path = nn.Identity() if drop_path is None else drop_path
        self.mlp = ConvMLP(dim, int(dim * mlp_ratio), axes, dropout, **made)
        self.layer_scale_1, self.layer_scale_2 = (
            nn.Parameter(torch.full((dim,), layer_scale, **made)) for _ in range(2)
        )
        convolutions: Any = (m for m in self.modules() if isinstance(m, CONVOLUTION_MODULES[axes]))
        for module in convolutions:
            nn.init.normal_(module.weight, std=fresh_deviation(module))
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map, of the shape of x [B, dim, X1..].

        Raises:
            ShapeMismatch: where x is of other axes or channels.
            RegardError: in training, where a channel of x is one number, which has no variance.
        """
        self._fits(x)
        if x.device.type == "cpu" and self.axes == 2 and not torch.compiler.is_compiling():
            x = x.contiguous(memory_format=torch.channels_last)
        if at_rest(x, self):
            inner = self.mlp.fc1.out_channels * max(1, math.prod(x.shape[2:]))
            return torch.cat([self._whole(part) for part in x.split(max(1, 2 * ROOM // inner))])
        return self._whole(x)

    def _whole(self, x: Tensor) -> Tensor:
        x = self._added(x, self.layer_scale_1, self.attn(self.norm1(x)))
        return self._added(x, self.layer_scale_2, self.mlp(self.norm2(x)))

    def _added(self, x: Tensor, scale: Tensor, branch: Tensor) -> Tensor:
        scale = scale.view(-1, *[1] * self.axes)
        if self.training:
            return x + self.drop_path(scale * branch)
        return torch.addcmul(x, scale, branch.to(x.dtype))

    def maps(self, x: Tensor) -> Maps:
        """Return the factors of every channel in the attention, [B, dim, H, W], signed and unbounded."""
        self._fits(x)
        return self.attn.spatial_gating_unit.maps(self.attn.entered(self.norm1(x)))

    def reference(self, x: Tensor) -> Tensor:
        self._fits(x)
        first, second = (s.view(-1, *[1] * self.axes) for s in (self.layer_scale_1, self.layer_scale_2))
        x = x + first * self.attn.reference(self.norm1(x))
        return x + second * self.mlp.reference(self.norm2(x))

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, self.dim, *(8, 7, 6)[: self.axes], generator=generator, dtype=torch.float64)

    def _fits(self, x: Tensor) -> None:
        check_map(x, self.dim, self.axes)
        if self.training:
            check_statistics(x)


def fresh_deviation(convolution: Any) -> float:
    """Return the standard deviation of a fresh convolution's weights, sqrt(2 / fan-out)."""
    taps = math.prod(convolution.kernel_size)
    return math.sqrt(2 * convolution.groups / (taps * convolution.out_channels))


def _check(dim: Any, kernel: Any, dilation: Any, axes: Any, ratio: Any) -> None:
    check_sizes(dim, kernel, dilation, axes)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not dim * ratio >= 1:
        raise RegardError(f"mlp_ratio is {ratio!r}; it must be a number that leaves the MLP a channel.")


@mechanism("lka-block")
@dataclass(frozen=True, kw_only=True)
class LKALayer(Spec):
    """A block of the visual attention network: large-kernel attention, then an MLP with a 3 x 3 convolution.

    Attributes:
        dim: channels of x, which are its dimension 1.
        mlp_ratio: inner channels of the MLP over `dim`.
        kernel, dilation: see `LargeKernelAttention`.
        axes: of the map, 1 to 3.
        layer_scale: what the scales of both branches begin with.

    Example:
        >>> LKALayer(dim=8, axes=3).build()(torch.randn(2, 8, 4, 6, 6)).shape
        torch.Size([2, 8, 4, 6, 6])
    """

    module: ClassVar = LKABlock
    costs: ClassVar = Costs(time="T D (d^axes + (K / d)^axes + D)", memory="T D")
    dim: int
    mlp_ratio: float = 4.0
    kernel: int = 21
    dilation: int = 3
    axes: int = 2
    layer_scale: float = 0.01

    def __post_init__(self) -> None:
        _check(self.dim, self.kernel, self.dilation, self.axes, self.mlp_ratio)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=6, layer_scale=0.5),
            cls(dim=4, mlp_ratio=2.0, kernel=7, dilation=2, axes=1, layer_scale=0.5),
            cls(dim=4, mlp_ratio=1.5, kernel=5, dilation=2, axes=3, layer_scale=0.5),
        )
