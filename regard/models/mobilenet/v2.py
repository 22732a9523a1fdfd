"""MobileNet-V2: inverted residuals, which widen, convolve depthwise and narrow again without activation.

    x = relu6(BN(conv 3 x 3 (image)))                           layer 0
    y = relu6(BN(conv 1 x 1 (x)))                               t times as many channels, where t > 1
    y = BN(conv 1 x 1 (relu6(BN(depthwise 3 x 3 (y)))))
    x = x + y, where shapes agree, else y                       each further layer
    x = relu6(BN(conv 1 x 1 (x)))                               the last layer
    logits = dropout(mean(x)) W + b

Source: Sandler et al., 2018, arXiv 1801.04381, table 2. Status: written from the paper; parameters
have torchvision's names but that `features.` is `layers.` here, which `official_names` changes, so that its
weights load, and its shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from regard.models.images.base import Maps
from regard.models.images.registry import image_family
from regard.models.mobilenet.config import MobileNetV2Config, rounded
from regard.models.mobilenet.layers import MobileNet, convolution, ends_of


class InvertedResidual(nn.Module):
    """One layer, [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widened = [convolution(inputs, inner, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *widened, convolution(inner, inner, 3, stride, inner),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.keeps = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.keeps else out


@image_family(*MobileNetV2Config.presets)
class MobileNetV2ForImageClassification(MobileNet):
    """MobileNet-V2 as an image classifier, and as a backbone that gives maps of features.

    Example:
        >>> import torch
        >>> config = MobileNetV2Config.preset("mobilenet-v2-small", num_labels=5)
        >>> model = MobileNetV2ForImageClassification(config).eval()
        >>> out = model(torch.randn(2, 3, 32, 32), output_hidden_states=True)
        >>> out.logits.shape, [tuple(x.shape) for x in out.hidden_states]
        (torch.Size([2, 5]), [(2, 40, 8, 8), (2, 128, 4, 4)])
    """

    config: MobileNetV2Config
    config_class = MobileNetV2Config

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__(config)
        width = rounded(config.stem * config.width)
        last = rounded(config.last * max(1.0, config.width))
        layers: list[nn.Module] = [convolution(config.num_channels, width, 3, config.stem_stride)]
        strides, self.widths = [config.stem_stride], [width]
        for expansion, channels, count, first in config.stages:
            outputs = rounded(channels * config.width)
            for stride in (first, *[1] * (count - 1)):
                layers.append(InvertedResidual(width, outputs, stride, expansion))
                strides.append(stride)
                self.widths.append(outputs)
                width = outputs
        layers.append(convolution(width, last, 1))
        self.widths.append(last)
        self.shrinks = math.prod(strides)
        self.ends = ends_of([*strides, 1], min(4, self.shrinks))
        kept = [isinstance(layer, InvertedResidual) and layer.keeps for layer in layers]
        self.layers = self.placed(layers, kept)
        head = nn.Linear(last, config.num_labels) if config.num_labels else nn.Identity()
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), head)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Maps:
        """Return the map before each layer that halves it, from a quarter of the image on, and the last."""
        return self.maps_of(self.layers, pixel_values)

    def classify(self, maps: Maps) -> Tensor:
        """Return the logits of the mean of the last map, or, without classes, that mean."""
        out: Tensor = self.classifier(maps[-1].mean((2, 3)))
        return out


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of torchvision's `mobilenet_v2` under the names that they have here.

    Example:
        >>> import torch
        >>> list(official_names({"features.0.0.weight": torch.ones(1), "classifier.1.bias": torch.ones(1)}))
        ['layers.0.0.weight', 'classifier.1.bias']
    """
    return {
        f"layers.{name.removeprefix('features.')}" if name.startswith("features.") else name: x
        for name, x in state.items()
    }
