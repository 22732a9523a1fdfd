"""NAT and DiNAT: image models of four levels whose layers are neighbourhood attention.

    x = LN(conv(conv(image)))                           two 3 x 3 convolutions of stride 2, channels last
    x = x + g1 na(LN x);  x = x + g2 MLP(LN x)          each layer; na with a bias by relative position
    x = LN(conv(x))                                     between levels, 3 x 3 of stride 2, twice the width
    logits = mean(LN x) W + b

DiNAT is NAT with dilation in every second layer. A map that is smaller than kernel times dilation is padded
with zeros at the bottom and right for the attention, and cut again.

Source: Hassani et al., 2023, arXiv 2204.07143, and Hassani and Shi, 2022, arXiv 2209.15001. Status: agrees
with the official code by reading, and parameters have its names, so that published weights load;
`official_names` makes them of transformers' DiNAT.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from regard.attention.neighborhood import NeighborhoodAttention
from regard.errors import RegardError
from regard.models.images import DropPath, ImageModel, drop_rates, image_family
from regard.models.images.base import Maps
from regard.models.neighborhood.config import NATConfig


class ConvTokenizer(nn.Module):
    """Two convolutions and a norm, [B, C, H, W] to [B, H / 4, W / 4, dim]."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class ConvDownsampler(nn.Module):
    """A convolution and a norm, [B, H, W, dim] to [B, H / 2, W / 2, 2 dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return out


class MLP(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, inner), nn.Linear(inner, dim), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return out


class NATLayer(nn.Module):
    """Attention and an MLP around a residual stream [B, H, W, dim]."""

    def __init__(self, config: NATConfig, level: int, layer: int, drop_path: float) -> None:
        super().__init__()
        dim, dilation = config.embed_dim * 2**level, config.dilation(level, layer)
        self.least, self.drop_path = config.kernel_size * dilation, DropPath(drop_path)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(
            dim, config.num_heads[level], config.kernel_size, dilation=dilation, position_bias=True,
            qkv_bias=config.qkv_bias, dropout=config.dropout,
        )  # fmt: skip
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), config.dropout)
        self.gamma1 = self.gamma2 = None
        if config.layer_scale is not None:
            self.gamma1, self.gamma2 = (
                nn.Parameter(torch.full((dim,), config.layer_scale)) for _ in range(2)
            )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(self._near(self.norm1(x)), self.gamma1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma2)

    def _near(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        short = max(0, self.least - height), max(0, self.least - width)
        padded = F.pad(x, (0, 0, 0, short[1], 0, short[0])) if any(short) else x
        self.attn.used = (height, width) if any(short) else None
        out: Tensor = self.attn(padded)
        return out[:, :height, :width]

    def _branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        out: Tensor = self.drop_path(x if scale is None else scale * x)
        return out


class NATLevel(nn.Module):
    """The layers of one width, and what leads to the next."""

    def __init__(self, config: NATConfig, level: int, drop_paths: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            NATLayer(config, level, layer, drop_path) for layer, drop_path in enumerate(drop_paths)
        )
        last = level == len(config.depths) - 1
        self.downsample = None if last else ConvDownsampler(config.embed_dim * 2**level)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def smaller(self, x: Tensor) -> Tensor:
        """Return the map for the next level, or, of the last, the same."""
        return x if self.downsample is None else self.downsample(x)


@image_family(*NATConfig.presets)
class NATForImageClassification(ImageModel):
    """NAT or DiNAT as an image classifier, and as a backbone that gives maps of features.

    Example:
        >>> config = NATConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 4], kernel_size=3, num_labels=10)
        >>> model = NATForImageClassification(config).eval()
        >>> out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
        >>> out.logits.shape, [tuple(x.shape) for x in out.hidden_states]
        (torch.Size([2, 10]), [(2, 16, 8, 8), (2, 32, 4, 4)])
    """

    config: NATConfig
    config_class = NATConfig

    def __init__(self, config: NATConfig) -> None:
        super().__init__(config)
        self.patch_embed = ConvTokenizer(config.num_channels, config.embed_dim)
        rates = drop_rates(config.drop_path_rate, config.depths)
        self.levels = nn.ModuleList(NATLevel(config, level, rates[level]) for level in range(len(rates)))
        width = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NeighborhoodAttention) and module.rpb is not None:
            init.trunc_normal_(module.rpb, std=self.config.initializer_range)
        elif isinstance(module, NATLayer) and module.gamma1 is not None and module.gamma2 is not None:
            init.constant_(module.gamma1, self.config.layer_scale)
            init.constant_(module.gamma2, self.config.layer_scale)

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map of each level, before it is made smaller for the next."""
        x: Tensor = self.patch_embed(pixel_values)
        maps = []
        for level in self.levels:
            assert isinstance(level, NATLevel)
            x = level(x)
            maps.append(x.movedim(3, 1))
            x = level.smaller(x)
        return tuple(maps)

    def classify(self, maps: Maps) -> Tensor:
        """Return the logits of the mean of the last map, or, without classes, that mean."""
        out: Tensor = self.head(self.norm(maps[-1].movedim(1, 3)).mean((1, 2)))
        return out


_NAMES = (
    ("dinat.", ""), ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."), ("encoder.levels.", "levels."), (".layers.", ".blocks."),
    (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".attention.self.rpb", ".attn.rpb"),
    (".attention.output.dense.", ".attn.proj."), (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."), ("classifier.", "head."),
)  # fmt: skip


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' `DinatForImageClassification` under the official names.

    Args:
        state: its `state_dict()`, or what its safetensors file holds.

    Raises:
        RegardError: where query, key and value are not all there.
    """
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        name = (
            f"norm.{name.rpartition('.')[2]}"
            if name.removeprefix("dinat.").startswith("layernorm.")
            else name
        )
        for old, new in _NAMES:
            name = name.replace(old, new)
        if name.endswith(".layer_scale_parameters"):
            stem = name.removesuffix("layer_scale_parameters")
            found[f"{stem}gamma1"], found[f"{stem}gamma2"] = x[0], x[1]
        elif ".attention.self.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            found[name.replace(".attention.self.query.", ".attn.qkv.")] = _joined(parts, state)
        elif ".attention.self." not in name:
            found[name] = x
    return found


def _joined(names: list[str], state: Mapping[str, Tensor]) -> Tensor:
    """Query, key and value of one layer as one matrix; `names` are half-way to the official ones."""
    old = [name.replace("levels.", "encoder.levels.", 1).replace(".blocks.", ".layers.", 1) for name in names]
    prefix = "dinat." if f"dinat.{old[0]}" in state else ""
    missing = [name for name in old if prefix + name not in state]
    if missing:
        raise RegardError(f"the weights have no {missing[0]}.")
    return torch.cat([state[prefix + name] for name in old])
