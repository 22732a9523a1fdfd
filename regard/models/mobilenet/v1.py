"""MobileNet-V1: depthwise separable convolutions in a row.

    x = relu(BN(conv 3 x 3 (image)))                            layer 0
    x = relu(BN(conv 1 x 1 (relu(BN(depthwise 3 x 3 (x))))))    each further layer
    logits = mean(x) W + b

Source: Howard et al., 2017, arXiv 1704.04861, table 1. Status: partly our choice: the published code is
TensorFlow's; parameters go by the names that most PyTorch versions have, `model.N.M` and `fc`, and counts are
those of the paper.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from regard.models.images.base import Maps
from regard.models.images.registry import image_family
from regard.models.mobilenet.config import MobileNetV1Config
from regard.models.mobilenet.layers import MobileNet, convolution, ends_of


@image_family(*MobileNetV1Config.presets)
class MobileNetV1ForImageClassification(MobileNet):
    """MobileNet-V1 as an image classifier, and as a backbone that gives maps of features.

    Example:
        >>> import torch
        >>> config = MobileNetV1Config(stem=8, layers=[[16, 2], [16, 1]], ulsam_replace=[2], num_labels=5)
        >>> model = MobileNetV1ForImageClassification(config).eval()
        >>> out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
        >>> out.logits.shape, [tuple(x.shape) for x in out.hidden_states]
        (torch.Size([2, 5]), [(2, 16, 8, 8)])
    """

    config: MobileNetV1Config
    config_class = MobileNetV1Config

    def __init__(self, config: MobileNetV1Config) -> None:
        super().__init__(config)
        strides = [config.stem_stride, *(stride for _, stride in config.layers)]
        widths = [max(1, round(n * config.width)) for n in (config.stem, *(n for n, _ in config.layers))]
        self.widths, self.shrinks = widths, math.prod(strides)
        self.ends = ends_of(strides, min(4, self.shrinks))
        layers: list[nn.Module] = [
            convolution(config.num_channels, widths[0], 3, strides[0], act=nn.ReLU),
            *(
                nn.Sequential(
                    *convolution(before, before, 3, stride, before, nn.ReLU),
                    *convolution(before, width, 1, act=nn.ReLU),
                )
                for before, width, stride in zip(widths, widths[1:], strides[1:], strict=False)
            ),
        ]
        same = [before == width for before, width in zip([0, *widths], widths, strict=False)]
        self.model = self.placed(layers, [s == 1 and fits for s, fits in zip(strides, same, strict=True)])
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(widths[-1], config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map before each layer that halves it, from a quarter of the image on, and the last."""
        return self.maps_of(self.model, pixel_values)

    def classify(self, maps: Maps) -> Tensor:
        """Return the logits of the mean of the last map, or, without classes, that mean."""
        out: Tensor = self.fc(self.dropout(maps[-1].mean((2, 3))))
        return out
