"""MLP-Mixer: patches mixed by MLPs over patches and over channels in turn.

    x = conv(pixels)                           [B, N, d]
    x = x + T(LN x);  x = x + C(LN x)          each layer; T: N -> t -> N over patches, C: d -> c -> d
    logits = mean(LN x) W + b

N is fixed by the image's size. Parameters have timm's names, so that its weights load. "mixer-small" and
"mixer-base" are S/16 and B/16 of the paper; "mixer-nano" and "mixer-digits" are ours, for images of 32 x 32
and 8 x 8.

Source: Tolstikhin et al., 2021, arXiv 2105.01601, section 2. Status: agrees with timm's by running both.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from regard.models.images.base import Maps
from regard.models.images.patches import PatchConfig, PatchModel
from regard.models.images.paths import DropPath, drop_rates
from regard.models.images.registry import image_family

EPS = 1e-6


class MLPMixerConfig(PatchConfig):
    """Sizes and options of an MLP-Mixer.

    Args:
        image_size, patch_size, hidden_size, num_hidden_layers: see `PatchConfig`.
        token_size: width inside the MLPs over patches.
        intermediate_size: width inside the MLPs over channels.
        dropout: inside and after the MLPs, in training.
        drop_path_rate: share of samples that skip a branch in training, in the last layer; it rises to that.
        initializer_range: standard deviation of fresh weights.
    """

    model_type = "regard_mixer"
    counts: ClassVar = (*PatchConfig.counts, "token_size", "intermediate_size")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mixer-digits": {
            "image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 3, "token_size": 128,
            "intermediate_size": 128,
        },
        "mixer-nano": {
            "image_size": 32, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 4, "token_size": 64,
            "intermediate_size": 256,
        },
        "mixer-small": {},
        "mixer-base": {
            "hidden_size": 768, "num_hidden_layers": 12, "token_size": 384, "intermediate_size": 3072,
        },
    }  # fmt: skip

    hidden_size: int = 512
    num_hidden_layers: int = 8
    token_size: int = 256
    intermediate_size: int = 2048
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02


class MixerMLP(nn.Module):
    """Two linear maps over the last axis, with GELU between."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(width, inner), nn.Linear(inner, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return out


class MixerLayer(nn.Module):
    """Both MLPs around a residual stream [B, N, d]."""

    def __init__(self, config: MLPMixerConfig, drop_path: float) -> None:
        super().__init__()
        rows, columns = config.grid
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, eps=EPS) for _ in range(2))
        self.mlp_tokens = MixerMLP(rows * columns, config.token_size, config.dropout)
        self.mlp_channels = MixerMLP(config.hidden_size, config.intermediate_size, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).mT).mT)
        out: Tensor = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return out


class Stem(nn.Module):
    """A convolution whose kernel is its stride, [B, C, H p, W p] to [B, H W, d]."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels).flatten(2).mT
        return out


@image_family(*MLPMixerConfig.presets)
class MLPMixerForImageClassification(PatchModel):
    """An MLP-Mixer as an image classifier; its maps are those after each layer, the last one normed.

    Example:
        >>> import torch
        >>> model = MLPMixerForImageClassification(MLPMixerConfig.preset("mixer-digits", num_channels=1))
        >>> model(torch.randn(2, 1, 8, 8)).logits.shape
        torch.Size([2, 2])
    """

    config: MLPMixerConfig
    config_class = MLPMixerConfig

    def __init__(self, config: MLPMixerConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config)
        (rates,) = drop_rates(config.drop_path_rate, [config.num_hidden_layers])
        self.blocks = nn.ModuleList(MixerLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.head = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    def features(self, pixel_values: Tensor) -> Maps:
        x = self.stem(pixel_values)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        maps[-1] = self.norm(x)
        return tuple(x.mT.unflatten(2, self.config.grid) for x in maps)

    def classify(self, maps: Maps) -> Tensor:
        logits: Tensor = self.head(maps[-1].mean((2, 3)))
        return logits
