"""BiFormer: an image model of four stages, in three of which regions choose the regions they attend to.

    x = BN(conv(GELU(BN(conv(image)))))                two 3 x 3 convolutions of stride 2
    x = x + conv(x)                                    each layer; depthwise, 3 x 3
    x = x + bra(LN x);  x = x + MLP(LN x)              each layer; all attend to all in the last stage
    x = BN(conv(x))                                    between stages, 3 x 3 of stride 2
    logits = mean(BN x) W + b

With `stem="patch"`, of BiFormer-STL, convolutions do not overlap, those between stages follow their norm, and
layers have no convolution of positions.

Source: Zhu et al., 2023, arXiv 2303.08810, section 4. Status: agrees with the official code
(rayleizhu/BiFormer, models/biformer.py and biformer_stl.py) by running both at 224 x 224; `official_names`
makes the names here of those of the published weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from regard.attention.biformer import BRA, LePEAttention, own_names
from regard.models.biformer.config import BiFormerConfig
from regard.models.images import DropPath, ImageModel, drop_rates, image_family
from regard.models.images.base import Maps


class MLP(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class BiFormerLayer(nn.Module):
    """A convolution of positions, attention and an MLP around a residual stream [B, H, W, dim]."""

    def __init__(self, config: BiFormerConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        dim, topk = int(config.embed_dims[stage]), int(config.topks[stage])
        self.pos_embed: nn.Module | None = None
        if config.position:
            self.pos_embed = nn.Conv2d(dim, dim, config.position, padding=config.position // 2, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn: BRA | LePEAttention = LePEAttention(dim, config.heads_of(stage), config.lepe)
        if topk:
            self.attn = BRA(
                dim, config.heads_of(stage), config.regions_of(stage), topk, config.lepe,
                mask_padding=config.mask_padding,
            )  # fmt: skip
        self.mlp, self.drop_path = MLP(dim, int(dim * config.mlp_ratio)), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x.movedim(-1, 1)).movedim(1, -1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


@image_family(*BiFormerConfig.presets)
class BiFormerForImageClassification(ImageModel):
    """BiFormer as an image classifier, and as a backbone that gives a map of features for each stage.

    Example:
        >>> model = BiFormerForImageClassification(BiFormerConfig.preset("biformer-nano", num_labels=10))
        >>> out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
        >>> out.logits.shape, [tuple(x.shape) for x in out.hidden_states]
        (torch.Size([2, 10]), [(2, 32, 16, 16), (2, 64, 8, 8)])
    """

    config: BiFormerConfig
    config_class = BiFormerConfig

    def __init__(self, config: BiFormerConfig) -> None:
        super().__init__(config)
        widths = [config.num_channels, *config.embed_dims]
        self.downsample_layers = nn.ModuleList(
            _stem(config, *widths[:2]) if i == 0 else _join(config, widths[i], widths[i + 1])
            for i in range(len(widths) - 1)
        )
        rates = drop_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(BiFormerLayer(config, stage, rate) for rate in rates[stage]))
            for stage in range(len(rates))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @property
    def smallest_image(self) -> int:
        """Height and width at which every map has as many positions as regions."""
        stride, least = self.config.stem_stride, 1
        for stage, topk in enumerate(self.config.topks):
            cells = self.config.regions_of(stage) if topk else 1
            patches = self.config.stem == "patch"
            least = max(least, cells * stride if patches else (cells - 1) * stride + 1)
            stride *= 2
        return least

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map of each stage."""
        x, maps = pixel_values.contiguous(memory_format=torch.channels_last), []
        for smaller, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(smaller(x).movedim(1, -1)).movedim(-1, 1)
            maps.append(x)
        return tuple(maps)

    def classify(self, maps: Maps) -> Tensor:
        """Return the logits of the mean of the last map, or, without classes, that mean."""
        out: Tensor = self.head(self.norm(maps[-1]).mean((2, 3)))
        return out


def _stem(config: BiFormerConfig, channels: int, dim: int) -> nn.Sequential:
    stride = config.stem_stride
    if config.stem == "patch":
        return nn.Sequential(nn.Conv2d(channels, dim, stride, stride=stride), nn.BatchNorm2d(dim))
    first, second = min(2, stride), max(1, stride // 2)
    return nn.Sequential(
        nn.Conv2d(channels, dim // 2, 3, stride=first, padding=1), nn.BatchNorm2d(dim // 2), nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=second, padding=1), nn.BatchNorm2d(dim),
    )  # fmt: skip


def _join(config: BiFormerConfig, dim: int, wider: int) -> nn.Sequential:
    """What leads from one stage to the next."""
    if config.stem == "patch":
        return nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, wider, 2, stride=2))
    return nn.Sequential(nn.Conv2d(dim, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider))


def official_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return published weights of BiFormer or BiFormer-STL under the names of this model.

    Args:
        state: the official model's `state_dict()`, which its checkpoints hold under "model"; with the older
            or the newer names of the attention.

    Example:
        >>> names = "stages.0.1.mlp.3.bias", "stages.0.1.attn.wo.bias"
        >>> [*official_names({name: torch.zeros(1) for name in names})]
        ['stages.0.1.mlp.fc2.bias', 'stages.0.1.attn.proj.bias']
    """
    found = {}
    for name, x in own_names(state).items():
        own = re.sub(r"^(stages\.\d+)\.blocks\.", r"\1.", name)
        own = re.sub(r"\.mlp\.([023])\.", lambda part: f".mlp.fc{1 if part[1] == '0' else 2}.", own)
        pixelwise = re.search(r"\.mlp\.fc[12]\.weight$", own) and x.ndim == 4
        found[own] = x.flatten(1) if pixelwise else x
    return found
