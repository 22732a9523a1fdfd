"""What MobileNet-V1 and -V2 share: convolutions with norms, subspace attention among layers, stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from regard.attention.ulsam import ULSAM
from regard.errors import RegardError
from regard.models.images.base import ImageModel, Maps


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU6
) -> nn.Sequential:
    """Return a convolution that keeps the size but for its stride, batch norm and an activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        act(inplace=True),
    )


class MobileNet(ImageModel):
    """Layers in a row, and where among them the maps of stages are taken."""

    ends: list[int]
    widths: list[int]

    def placed(self, layers: list[nn.Module], kept: Sequence[bool]) -> nn.Sequential:
        """Return layers with subspace attention in the place of some and after others.

        Args:
            layers: in order.
            kept: whether a layer keeps channels and size.

        Raises:
            RegardError: where there is no such layer, or what is to be replaced does not keep the shape.
        """
        config: Any = self.config
        for name in ("ulsam_replace", "ulsam_after"):
            for at in getattr(config, name):
                if not 0 <= at < len(layers):
                    raise RegardError(f"{name} names layer {at}; layers are 0 to {len(layers) - 1}.")
                attention = ULSAM(self.widths[at], config.ulsam_groups, config.ulsam_norm)
                if name == "ulsam_after":
                    layers[at] = nn.Sequential(layers[at], attention)
                elif kept[at]:
                    layers[at] = attention
                else:
                    raise RegardError(
                        f"ulsam_replace names layer {at}, which changes channels or size; those that keep "
                        f"them are {', '.join(str(i) for i, keeps in enumerate(kept) if keeps)}."
                    )
        return nn.Sequential(*layers)

    @property
    def smallest_image(self) -> int:
        """Height and width of which the last map is one position."""
        return int(self.shrinks)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)

    def maps_of(self, layers: nn.Module, x: Tensor) -> Maps:
        """Return the maps after those layers that end a stage."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for at, layer in enumerate(layers.children()):
            x = layer(x)
            if at in self.ends:
                maps.append(x)
        return tuple(maps)


def ends_of(strides: Sequence[int], first: int = 1) -> list[int]:
    """Return where stages end: before a layer that shrinks what has shrunk by `first`, and at the end.

    Example:
        >>> ends_of([2, 1, 2, 1, 2, 1, 1], first=4)
        [3, 6]
    """
    shrunk, ends = 1, []
    for at, stride in enumerate(strides):
        if stride > 1 and at and shrunk >= first:
            ends.append(at - 1)
        shrunk *= stride
    return [*ends, len(strides) - 1]
