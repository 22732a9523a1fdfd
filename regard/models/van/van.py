"""VAN, a convolutional image classifier whose blocks gate features by large-kernel attention.

    x = BN(conv(image))                     7 x 7 of stride 4, each position of a map a patch
    x = block(x)                            as often as the stage is deep; see `LKABlock`
    x = LN(x)                               over channels: the map of the stage [B, C, H, W]
    x = BN(conv(x))                         to the next stage, 3 x 3 of stride 2
    logits = mean(x) W + b                  of the last map

Source: Guo et al., 2022, arXiv 2202.09741. Status: agrees with the official code by running both, parameters
have its names, so that published weights load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from regard.attention.checks import check_statistics
from regard.attention.large_kernel.block import LKABlock, fresh_deviation
from regard.models.images.base import ImageModel, Maps
from regard.models.images.paths import DropPath, drop_rates
from regard.models.images.registry import image_family
from regard.models.van.config import VANConfig


class PatchEmbedding(nn.Module):
    """A convolution and a norm, [B, C, H, W] to [B, width, H / stride, W / stride]."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        kernel = 7 if stride >= 4 else 3
        self.proj = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if self.training:
            check_statistics(x)
        out: Tensor = self.norm(x)
        return out


@image_family(*VANConfig.presets)
class VANForImageClassification(ImageModel):
    """VAN as an image classifier, and as a backbone that gives maps of features.

    Example:
        >>> config = VANConfig(widths=[8, 16], depths=[1, 1], mlp_ratios=[2, 2], strides=[4, 2], num_labels=5)
        >>> model = VANForImageClassification(config).eval()
        >>> out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
        >>> out.logits.shape, [tuple(x.shape) for x in out.hidden_states]
        (torch.Size([2, 5]), [(2, 8, 8, 8), (2, 16, 4, 4)])
    """

    config: VANConfig
    config_class = VANConfig

    def __init__(self, config: VANConfig) -> None:
        super().__init__(config)
        self.stages = len(config.depths)
        rates = drop_rates(config.drop_path_rate, config.depths)
        channels = config.num_channels
        for stage in range(self.stages):
            width = config.widths[stage]
            embedding = PatchEmbedding(channels, width, config.strides[stage])
            blocks = nn.ModuleList(self._block(stage, rate) for rate in rates[stage])
            self.add_module(f"patch_embed{stage + 1}", embedding)
            self.add_module(f"block{stage + 1}", blocks)
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(width, eps=1e-6))
            channels = width
        self.head = nn.Linear(channels, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def _block(self, stage: int, rate: float) -> LKABlock:
        config = self.config
        path = DropPath(rate) if rate else None
        return LKABlock(
            config.widths[stage], config.mlp_ratios[stage], config.kernel, config.dilation,
            layer_scale=config.layer_scale, dropout=config.dropout, drop_path=path,
        )  # fmt: skip

    @property
    def smallest_image(self) -> int:
        """Height and width of which the last map is one position."""
        return math.prod(self.config.strides)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=fresh_deviation(module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, LKABlock):
            init.constant_(module.layer_scale_1, self.config.layer_scale)
            init.constant_(module.layer_scale_2, self.config.layer_scale)

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map of each stage, after its norm."""
        x, maps = pixel_values, []
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            for block in self.get_submodule(f"block{stage}").children():
                x = block(x)
            x = self.get_submodule(f"norm{stage}")(x.movedim(1, 3)).movedim(3, 1)
            maps.append(x)
        return tuple(maps)

    def classify(self, maps: Maps) -> Tensor:
        """Return the logits of the mean of the last map, or, without classes, that mean."""
        out: Tensor = self.head(maps[-1].mean((2, 3)))
        return out
