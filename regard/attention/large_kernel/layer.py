"""Large-kernel attention of a map x [B, dim, X1..], in one to three axes, channels first.

    a = W dwd(dw(x)) + b    dw: depthwise, 2 d - 1 taps an axis;  dwd: depthwise, ceil(K / d) taps, d apart
    out = a * x             elementwise: no softmax, no sigmoid, a is signed and unbounded

dim ((2 d - 1)^2 + ceil(K / d)^2 + dim) weights in two axes. The two reach (2 d - 1) + (ceil(K / d) - 1) d
positions along an axis, 23 with the published K = 21 and d = 3. Each pads with zeros on its own.

Source: Guo et al., 2022, arXiv 2202.09741, section 3.1. Status: agrees with the official code by running
both, parameters have its names. Other K, d and axes are our choice, as is that an even kernel has its odd tap
after the position; under float16 autocast the gate multiplies in float32, and returns it, since products of
two unbounded numbers overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block, Maps
from regard.attention.costs import Costs
from regard.attention.registry import Spec, mechanism
from regard.engines.depthwise import CONVOLUTIONS, before, depthwise
from regard.errors import RegardError, ShapeMismatch

CONVOLUTION_MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LargeKernelAttention(Block):
    """Large-kernel attention; the module of `LargeKernel`.

    Args:
        dim: channels of x.
        kernel: width of the kernel that is decomposed, K.
        dilation: d, from 1 to `kernel`.
        axes: of the map, 1 to 3.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = LargeKernelAttention(16)
        >>> out, attention = layer(torch.randn(2, 16, 20, 24), return_attention=True)
        >>> out.shape, attention.shape, layer.reach
        (torch.Size([2, 16, 20, 24]), torch.Size([2, 16, 20, 24]), 23)
    """

    def __init__(
        self, dim: int, kernel: int = 21, dilation: int = 3, axes: int = 2, *,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(dim, kernel, dilation, axes)
        self.dim, self.kernel, self.dilation, self.axes = dim, kernel, dilation, axes
        self.shows = "maps" if axes == 2 else None
        convolution: Any = CONVOLUTION_MODULES[axes]
        made = {"device": device, "dtype": dtype}
        taps, spread = 2 * dilation - 1, -(-kernel // dilation)
        self.conv0 = convolution(dim, dim, taps, padding="same", groups=dim, **made)
        self.conv_spatial = convolution(
            dim, dim, spread, padding="same", groups=dim, dilation=dilation, **made
        )
        self.conv1 = convolution(dim, dim, 1, **made)

    @property
    def reach(self) -> int:
        """How many positions along an axis can move one output."""
        return (2 * self.dilation - 1) + (self.conv_spatial.kernel_size[0] - 1) * self.dilation

    @overload
    def forward(self, x: Tensor, return_attention: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_attention: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_attention: bool = False) -> Any:
        """Return a * x, of the shape of x [B, dim, X1..].

        Args:
            x: the map.
            return_attention: whether to return a as well, of the same shape: a factor of either sign and any
                size for every number of x, no probability.

        Raises:
            ShapeMismatch: where x is of other axes or channels.
        """
        attention = self.attention(x)
        if overflows(x):
            attention, x = attention.float(), x.float()
        out = attention * x
        return (out, attention) if return_attention else out

    def attention(self, x: Tensor) -> Tensor:
        """Return the factors a, [B, dim, X1..]."""
        check_map(x, self.dim, self.axes)
        found = depthwise(x, self.conv0.weight, self.conv0.bias)
        found = depthwise(found, self.conv_spatial.weight, self.conv_spatial.bias, dilation=self.dilation)
        out: Tensor = self.conv1(found)
        return out

    def maps(self, x: Tensor) -> Maps:
        """Return the factors of every channel, [B, dim, H, W], which are of either sign and unbounded."""
        return Maps(self.attention(x), "gate", "channel") if self.axes == 2 else super().maps(x)

    def reference(self, x: Tensor) -> Tensor:
        check_map(x, self.dim, self.axes)
        return x * self.conv1(as_written(as_written(x, self.conv0), self.conv_spatial))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kernel={self.kernel}, dilation={self.dilation}, axes={self.axes}"

    def example(self, generator: torch.Generator) -> Tensor:
        grid = (9, 8, 7)[: self.axes]
        return torch.randn(2, self.dim, *grid, generator=generator, dtype=torch.float64)


def as_written(x: Tensor, given: Any) -> Tensor:
    """Return a depthwise convolution by torch's own, padded beforehand."""
    sides = []
    for taps in reversed(given.kernel_size):
        first = before(taps, given.dilation[0])
        sides += [first, given.dilation[0] * (taps - 1) - first]
    convolve = CONVOLUTIONS[x.ndim - 2]
    return convolve(F.pad(x, sides), given.weight, given.bias, dilation=given.dilation, groups=given.groups)


def overflows(x: Tensor) -> bool:
    """Whether products are computed in float16 by autocast, and so can overflow without a word."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return False
    return torch.get_autocast_dtype(kind) == torch.float16


def check_sizes(dim: Any, kernel: Any, dilation: Any, axes: Any) -> None:
    """Refuse what no layer can be made of."""
    for name, value in (("dim", dim), ("kernel", kernel), ("dilation", dilation)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if dilation > kernel:
        raise RegardError(f"dilation is {dilation} and kernel {kernel}; kernel must be as large at least.")
    if axes not in (1, 2, 3):
        raise RegardError(f"axes is {axes!r}; it must be 1, 2 or 3.")


def check_map(x: Tensor, dim: int, axes: int) -> None:
    """Refuse what is no map of these channels and axes."""
    if x.ndim != axes + 2 or x.shape[1] != dim or not x.is_floating_point():
        grid = ", ".join(("height", "width") if axes == 2 else [f"X{i + 1}" for i in range(axes)])
        raise ShapeMismatch(f"x must be floating-point [batch, {dim}, {grid}], and is {list(x.shape)}.")


@mechanism("large-kernel")
@dataclass(frozen=True, kw_only=True)
class LargeKernel(Spec):
    """A depthwise convolution of wide reach, decomposed into three, that multiplies the features of a map.

    Attributes:
        dim: channels of x, which are its dimension 1.
        kernel: width of the kernel that is decomposed.
        dilation: from 1 to `kernel`.
        axes: of the map, 1 to 3.

    Example:
        >>> layer = LargeKernel(dim=8, axes=1).build()
        >>> layer(torch.randn(2, 8, 50)).shape
        torch.Size([2, 8, 50])
    """

    module: ClassVar = LargeKernelAttention
    costs: ClassVar = Costs(time="T D (d^axes + (K / d)^axes + D)", memory="T D")
    dim: int
    kernel: int = 21
    dilation: int = 3
    axes: int = 2

    def __post_init__(self) -> None:
        check_sizes(self.dim, self.kernel, self.dilation, self.axes)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=6),
            cls(dim=4, kernel=20, dilation=4, axes=1),
            cls(dim=3, kernel=8, dilation=1),
            cls(dim=4, kernel=7, dilation=2, axes=3),
        )
