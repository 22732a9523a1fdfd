"""HaloNet: a ResNet of bottlenecks in which halo attention stands in the place of 3 x 3 convolutions.

    y = act(BN(W1 x))                                   1 x 1
    y = act(BN(halo attention(y))), or act(BN(conv3x3(y))), and attention to channels
    x = act(shortcut(x) + BN(W3 y))                     the first block of a stage is strided in its middle

Source: Vaswani et al., 2021, arXiv 2103.12731, section 3. Status: agrees with timm 1.0.31 (byoanet) by
running both at 256 x 256: names, shapes, logits to 1e-15 in float64, parameters and operations of
`halonet_h1`, `halonet26t`, `sehalonet33ts`, `halonet50ts` and `eca_halonext26ts`; the paper's own table is
not confirmed. Maps that blocks do not divide, which timm refuses, have a shorter last block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from regard.attention.halo import HaloAttention
from regard.attention.halo.layer import RelativeTables
from regard.models.halonet.config import HaloNetConfig
from regard.models.halonet.parts import ACTIVATIONS, CHANNEL_ATTENTION, ConvNorm, LastNorm, NormAct
from regard.models.images import DropPath, ImageModel, drop_rates, image_family
from regard.models.images.base import Maps

BY_INPUTS = "drawn_by_inputs"
"""Attribute of convolutions whose fresh weights are of deviation in_channels^-1/2: those of the attention."""


class Bottleneck(nn.Module):
    """1 x 1, what mixes positions, 1 x 1, around a residual stream."""

    def __init__(self, config: HaloNetConfig, stage: int, dim: int, stride: int, drop_path: float) -> None:
        super().__init__()
        out = config.widths[stage]
        same = dim == out and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(dim, out, stride=stride)
        self.conv1_1x1 = ConvNorm(dim, config.inner[stage], act=config.act)
        self.mix(config, stage, stride)
        self.drop_path, self.act = DropPath(drop_path), ACTIVATIONS[config.act]()

    def mix(self, config: HaloNetConfig, stage: int, stride: int) -> None:
        """Make what mixes positions, and the convolution after it."""
        inner = config.inner[stage]
        groups = inner // config.group_width if config.group_width else 1
        self.conv2_kxk: nn.Module = ConvNorm(inner, inner, 3, stride, config.act, groups)
        channels = CHANNEL_ATTENTION.get(config.channel_attention)
        self.attn = nn.Identity() if channels is None else channels(inner)
        self.conv3_1x1 = ConvNorm(inner, config.widths[stage], last=True)

    def mixed(self, x: Tensor) -> Tensor:
        """Return x after what mixes positions."""
        out: Tensor = self.attn(self.conv2_kxk(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3_1x1(self.mixed(self.conv1_1x1(x)))
        out: Tensor = self.act(self.shortcut(x) + self.drop_path(y))
        return out


class HaloBottleneck(Bottleneck):
    """A bottleneck with halo attention in its middle."""

    def mix(self, config: HaloNetConfig, stage: int, stride: int) -> None:
        """Make the attention, its norm, and the convolution after it."""
        inner, values, heads = config.inner[stage], config.values_of(stage), config.heads_of(stage)
        odd = stride == 2 and config.block % 2 == 1
        self.self_attn = HaloAttention(
            inner, values, heads, config.block, config.halo, dim_head=config.dim_head or inner // heads,
            stride=stride, rel_stride=None if stride == 1 else config.rel_stride, border=config.border,
            pad=config.pad, average=odd,
        )  # fmt: skip
        self.post_attn = NormAct(values, config.act)
        for conv in (self.self_attn.q, self.self_attn.kv):
            setattr(conv, BY_INPUTS, True)
        self.conv3_1x1 = ConvNorm(values, config.widths[stage], last=True)

    def mixed(self, x: Tensor) -> Tensor:
        """Return x after the attention."""
        out: Tensor = self.post_attn(self.self_attn(x))
        return out


@image_family(*HaloNetConfig.presets)
class HaloNetForImageClassification(ImageModel):
    """HaloNet as an image classifier, and as a backbone that gives a map of features for each stage.

    Example:
        >>> model = HaloNetForImageClassification(HaloNetConfig.preset("halonet-small", num_labels=10)).eval()
        >>> out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
        >>> out.logits.shape, [tuple(x.shape) for x in out.hidden_states]
        (torch.Size([2, 10]), [(2, 64, 16, 16), (2, 128, 8, 8)])
    """

    config: HaloNetConfig
    config_class = HaloNetConfig

    def __init__(self, config: HaloNetConfig) -> None:
        super().__init__(config)
        self.stem = _stem(config)
        rates = drop_rates(config.drop_path_rate, config.depths)
        befores = [config.stem_width, *config.widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(*_stage(config, stage, befores[stage], rates[stage]))
            for stage in range(len(befores))
        )
        width = config.widths[-1]
        self.final_conv: nn.Module = nn.Identity()
        if config.num_features:
            self.final_conv = ConvNorm(width, config.num_features, act=config.act)
            width = config.num_features
        self.head = nn.ModuleDict({"fc": nn.Linear(width, config.num_labels)} if config.num_labels else {})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            if getattr(module, BY_INPUTS, False):
                init.trunc_normal_(module.weight, std=module.in_channels**-0.5)
            else:
                fan = module.weight[:, 0].numel() // module.groups
                init.normal_(module.weight, std=(2 / fan) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
        elif isinstance(module, LastNorm):
            init.zeros_(module.weight)
        elif isinstance(module, RelativeTables):
            for table in module.tables():
                init.trunc_normal_(table, std=table.shape[1] ** -0.5)

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map of each stage."""
        x, maps = self.stem(pixel_values), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def classify(self, maps: Maps) -> Tensor:
        """Return the logits of the mean of the last map, or, without classes, that mean."""
        x = self.final_conv(maps[-1]).mean((2, 3))
        out: Tensor = self.head["fc"](x) if "fc" in self.head else x
        return out


def _stem(config: HaloNetConfig) -> nn.Sequential:
    width, act, stride = config.stem_width, config.act, config.stem_stride
    stem = nn.Sequential()
    if config.stem == "tiered":
        last = 1 if config.stem_pool else 2
        stem.add_module("conv1", ConvNorm(config.num_channels, 3 * width // 8, 3, stride, act))
        stem.add_module("conv2", ConvNorm(3 * width // 8, width // 2, 3, 1, act))
        stem.add_module("conv3", ConvNorm(width // 2, width, 3, last, act))
    else:
        stem.add_module("conv1", ConvNorm(config.num_channels, width, int(config.stem[0]), stride, act))
    if config.stem_pool:
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return stem


def _stage(config: HaloNetConfig, stage: int, before: int, rates: list[float]) -> list[Bottleneck]:
    blocks = []
    for layer, rate in enumerate(rates):
        kind = HaloBottleneck if layer in config.attends[stage] else Bottleneck
        stride = config.strides[stage] if layer == 0 else 1
        blocks.append(kind(config, stage, before if layer == 0 else config.widths[stage], stride, rate))
    return blocks
