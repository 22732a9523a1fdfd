"""NiNformer as an image classifier: patches, blocks, the mean over tokens, a linear layer.

    x = conv(pixels)                            [B, N, d], kernel and stride the patch; no positions are added
    x = block(x)                                each; token mixing has weights of its own for every position
    logits = mean(x) W + b                      no norm before

"ninformer-cifar" has the official sizes for CIFAR-10, with their dropout of 0.5; "ninformer-small" (32 x 32)
and "ninformer-digits" (8 x 8) are ours.

Source: Abdullah and Aydin, 2024, arXiv 2403.02411. Status: agrees with the official code by running both;
parameters have its names. `resize_tokens` is ours.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from regard.models.images.base import Maps
from regard.models.images.patches import PatchConfig, PatchModel
from regard.models.images.registry import image_family
from regard.models.ninformer.stack import NiNformer, resized


class NiNformerConfig(PatchConfig):
    """Sizes and options of a NiNformer.

    Args:
        image_size, patch_size, hidden_size, num_hidden_layers: see `PatchConfig`.
        intermediate_size: width inside the MLPs and the channel mixing.
        token_size: width inside the token mixing; None for that of the others, as published.
        dropout: in training, everywhere but after the patches.
        share_norm: whether the two sublayers of a block have one LayerNorm together, as published.
        gate: "raw", as published, "sigmoid", "one" or "add"; see `NiNMixer`.
        generator: "mixer", as published, or "fourier".
    """

    model_type = "regard_ninformer"
    counts: ClassVar = (*PatchConfig.counts, "intermediate_size")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "ninformer-digits": {
            "image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 3,
            "intermediate_size": 128, "dropout": 0.1,
        },
        "ninformer-small": {"hidden_size": 128, "intermediate_size": 256, "dropout": 0.1},
        "ninformer-cifar": {},
    }  # fmt: skip

    image_size: int | list[int] | tuple[int, ...] = 32
    patch_size: int = 4
    hidden_size: int = 256
    num_hidden_layers: int = 4
    intermediate_size: int = 512
    token_size: int | None = None
    dropout: float = 0.5
    share_norm: bool = True
    gate: str = "raw"
    generator: str = "mixer"


@image_family(*NiNformerConfig.presets)
class NiNformerForImageClassification(PatchModel):
    """NiNformer as an image classifier; its maps are those after each block.

    Example:
        >>> model = NiNformerForImageClassification(NiNformerConfig.preset("ninformer-cifar", num_labels=10))
        >>> sum(p.numel() for p in model.model.parameters())
        2637056
    """

    config: NiNformerConfig
    config_class = NiNformerConfig

    def __init__(self, config: NiNformerConfig) -> None:
        super().__init__(config)
        dim, patch, (rows, columns) = config.hidden_size, config.patch_size, config.grid
        self.model = NiNformer(
            config.num_hidden_layers, dim, rows * columns, config.intermediate_size,
            token_hidden=config.token_size, dropout=config.dropout, share_norm=config.share_norm,
            gate=config.gate, generator=config.generator, grid=config.grid,
        ).model  # fmt: skip
        self.patcher = nn.Conv2d(config.num_channels, dim, patch, stride=patch)
        self.classifier = nn.Linear(dim, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As torch does by default, and so the official code."""
        if not isinstance(module, nn.Linear | nn.Conv2d):
            super()._init_weights(module)
            return
        reach = module.weight[0].numel() ** -0.5
        init.uniform_(module.weight, -reach, reach)
        if module.bias is not None:
            init.uniform_(module.bias, -reach, reach)

    def features(self, pixel_values: Tensor) -> Maps:
        x = self.patcher(pixel_values).flatten(2).mT
        maps = []
        for block in self.model:
            x = block(x)
            maps.append(x.mT.unflatten(2, self.config.grid))
        return tuple(maps)

    def classify(self, maps: Maps) -> Tensor:
        logits: Tensor = self.classifier(maps[-1].mean((2, 3)))
        return logits

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        """Return the tokens after the last block, [B, N, hidden_size], as timm's models do."""
        self._check_images(pixel_values)
        return self.features(pixel_values)[-1].flatten(2).mT

    def resize_tokens(
        self, grid: tuple[int, int], mode: str = "bicubic"
    ) -> NiNformerForImageClassification:  # fmt: skip
        """Return a model for images of `grid` patches, an extension of ours; see `NiNMixer.resize_tokens`.

        Args:
            grid: rows and columns of patches; the patches stay as large.
            mode: "bicubic", "bilinear" or "nearest".
        """
        made = copy.deepcopy(self)
        made.model = resized(self.model, grid, mode)
        made.config.image_size = [side * self.config.patch_size for side in grid]
        return made
