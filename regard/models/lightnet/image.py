"""LightNet for images: patches, MD-TPE over rows and columns, layers that see the whole grid in one scan.

    x = MD-TPE(patches W), a class token in front            x [B, 1 + rows x columns, dim]
    x = x + LightNet(norm(x));  x = x + GLU(norm(x))         each layer
    logits = norm(x of the class token, or the mean over patches) W

Source: Qin et al., 2024, arXiv 2405.21022. Status: paper only; what an image is
judged at is a choice of the config.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.output_capturing import capture_outputs

from regard.attention.lightnet import MDTPE
from regard.errors import ShapeMismatch
from regard.models.lightnet.config import LightNetConfig
from regard.models.lightnet.parts import LightNetBlock, LightNetPreTrainedModel


class LightNetForImageClassification(LightNetPreTrainedModel):
    """An image classifier; any image whose sides patches divide is taken, positions are relative.

    Example:
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LightNetForImageClassification(LightNetConfig(**sizes, image_size=32, patch_size=8))
        >>> model(torch.randn(2, 3, 32, 32)).logits.shape
        torch.Size([2, 2])
    """

    main_input_name = "pixel_values"

    def __init__(self, config: LightNetConfig) -> None:
        super().__init__(config)
        dim, patch = config.hidden_size, config.patch_size
        self.grid = config.grid
        self.patches = nn.Conv2d(config.num_channels, dim, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim)) if config.class_token else None
        self.smooth = MDTPE(dim, config.num_attention_heads, 2, eps=config.norm_eps) if config.tpe else None
        self.layers = nn.ModuleList(
            LightNetBlock(config, layer, axes=2) for layer in range(config.num_hidden_layers)
        )
        self.norm, self.head = nn.RMSNorm(dim, eps=config.norm_eps), nn.Linear(dim, config.num_labels)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.token is not None:
            init.normal_(self.token, std=self.config.initializer_range)

    @capture_outputs
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Return logits [B, num_labels], and the loss where there are labels.

        Args:
            pixel_values: [B, num_channels, height, width].
            labels: int64 [B].
        """
        self._check(pixel_values)
        x = self.patches(pixel_values)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        if self.smooth is not None:
            x = self.smooth(x, grid=grid)
        front = 0 if self.token is None else 1
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, grid=grid, class_tokens=front)
        x = self.norm(x)
        logits = self.head(x[:, 0] if front else x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _check(self, pixels: Tensor) -> None:
        patch, channels = self.config.patch_size, self.config.num_channels
        fits = pixels.ndim == 4 and pixels.shape[1] == channels
        if not fits or pixels.shape[2] % patch or pixels.shape[3] % patch or not pixels.shape[2:].numel():
            raise ShapeMismatch(
                f"pixel_values must be [batch, {channels}, height, width] with sides that {patch} divides, "
                f"and are {list(pixels.shape)}."
            )
