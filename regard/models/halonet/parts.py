"""What HaloNet's blocks are made of: convolutions with norms, attention to channels; names are timm's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "": nn.Identity}


class LastNorm(nn.BatchNorm2d):
    """A norm of batches whose fresh scales are 0, so that the branch it ends begins as nothing."""


class ConvNorm(nn.Module):
    """A convolution without bias, a norm of batches and an activation, `act` "" for none."""

    def __init__(
        self, dim: int, out: int, kernel: int = 1, stride: int = 1, act: str = "", groups: int = 1,
        last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = LastNorm(out) if last else nn.BatchNorm2d(out)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class NormAct(nn.BatchNorm2d):
    """A norm of batches and an activation."""

    def __init__(self, dim: int, act: str) -> None:
        super().__init__(dim)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class SqueezeExcite(nn.Module):
    """Channels scaled by an MLP of their means, a sixteenth as wide (Hu et al., 2018, arXiv 1709.01507)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(8, (dim // 16 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class EfficientChannelAttention(nn.Module):
    """Channels scaled by a convolution over their means (Wang et al., 2020, arXiv 1910.03151)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = int((math.log2(dim) + 1) / 2)
        width = max(3, width if width % 2 else width + 1)
        self.conv = nn.Conv1d(1, 1, width, padding=width // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))
        return x * factors[:, 0, :, None, None]


CHANNEL_ATTENTION: dict[str, type[nn.Module]] = {"se": SqueezeExcite, "eca": EfficientChannelAttention}
