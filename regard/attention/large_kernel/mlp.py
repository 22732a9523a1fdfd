"""The MLP of a large-kernel block: two 1 x 1 convolutions, a depthwise 3 x 3 and GELU between.

    out = fc2(gelu(dw(fc1(x))))         [B, dim, X1..] -> [B, inner, X1..] -> [B, dim, X1..]

Source: Guo et al., 2022, arXiv 2202.09741, section 3.2. Status: agrees with the official code by running
both, parameters have its names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.large_kernel.layer import CONVOLUTION_MODULES, as_written
from regard.engines.depthwise import CONVOLUTIONS, depthwise

ROOM = 2**20
STEP = 64


class Depthwise(nn.Module):
    """A depthwise convolution of three taps an axis."""

    def __init__(self, dim: int, axes: int, **made: Any) -> None:
        super().__init__()
        self.dwconv = CONVOLUTION_MODULES[axes](dim, dim, 3, padding=1, groups=dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.dwconv.weight, self.dwconv.bias)


class ConvMLP(nn.Module):
    """The MLP, of x [B, dim, X1..].

    Args:
        dim: channels of x.
        inner: channels between.
        axes: of the map, 1 to 3.
        dropout: share of numbers dropped after GELU and at the end, in training.
    """

    def __init__(self, dim: int, inner: int, axes: int, dropout: float, **made: Any) -> None:
        super().__init__()
        convolution: Any = CONVOLUTION_MODULES[axes]
        self.fc1 = convolution(dim, inner, 1, **made)
        self.dwconv = Depthwise(inner, axes, **made)
        self.fc2 = convolution(inner, dim, 1, **made)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        step = self._step(x)
        if step < self.fc1.out_channels:
            return self._in_stretches(x, step)
        out: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.dwconv(self.fc1(x))))))
        return out

    def reference(self, x: Tensor) -> Tensor:
        """Return the output as it is written, without dropout."""
        out: Tensor = self.fc2(F.gelu(as_written(self.fc1(x), self.dwconv.dwconv)))
        return out

    def _step(self, x: Tensor) -> int:
        """How many inner channels to take at a time: where nothing has to be kept, few enough for a cache."""
        if not at_rest(x, self):
            return self.fc1.out_channels
        return max(STEP, ROOM // max(1, x[:, 0].numel()) // STEP * STEP)

    def _in_stretches(self, x: Tensor, step: int) -> Tensor:
        """The same, as a sum over stretches of inner channels, which do not mix before `fc2`."""
        convolve, out = CONVOLUTIONS[x.ndim - 2], None
        taps: Any = self.dwconv.dwconv
        for start in range(0, self.fc1.out_channels, step):
            part = slice(start, start + step)
            found = convolve(x, self.fc1.weight[part], self.fc1.bias[part])
            found = F.gelu(depthwise(found, taps.weight[part], taps.bias[part]))
            found = convolve(found, self.fc2.weight[:, part], None if start else self.fc2.bias)
            out = found if out is None else out.add_(found)
        assert out is not None
        return out


def at_rest(x: Tensor, module: nn.Module) -> bool:
    """Whether a module in evaluation computes on a CPU, and keeps nothing for gradients."""
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
