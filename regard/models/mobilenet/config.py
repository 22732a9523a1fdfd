"""Sizes and options of MobileNet-V1 and -V2: the published, with subspace attention, and small ones.

Where subspace attention stands in the published models: the paper counts layers from the first convolution as
1, so that what it calls 14 and 17 of V2 are layers 13 and 16 here, counted from 0. Which of the layers of
equal shape is replaced does not change the counts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from regard.errors import RegardError
from regard.models.images.base import ImageConfig

_V2_STAGES = [
    [1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]
]  # fmt: skip
_V1_LAYERS = [
    [64, 1], [128, 2], [128, 1], [256, 2], [256, 1], [512, 2], *([[512, 1]] * 5), [1024, 2], [1024, 1]
]  # fmt: skip
_V2_SMALL: dict[str, Any] = {
    "stem": 16, "stem_stride": 1, "last": 128, "dropout": 0.0,
    "stages": [[1, 16, 1, 1], [4, 24, 2, 2], [4, 40, 3, 2], [4, 64, 2, 2]],
}  # fmt: skip
_V1_SMALL: dict[str, Any] = {
    "stem": 16, "stem_stride": 1, "layers": [[32, 1], [64, 2], [64, 1], [128, 2], [128, 1], [128, 2]]
}  # fmt: skip


class _MobileNetConfig(ImageConfig):
    """What both have."""

    stem: int = 32
    stem_stride: int = 2
    width: float = 1.0
    dropout: float = 0.2
    ulsam_replace: list[int] | tuple[int, ...] = ()
    ulsam_after: list[int] | tuple[int, ...] = ()
    ulsam_groups: int = 4
    ulsam_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.width > 0:
            raise RegardError(f"width is {self.width}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise RegardError(f"dropout is {self.dropout}; it must be from 0 to below 1.")
        both = set(self.ulsam_replace) & set(self.ulsam_after)
        if both:
            raise RegardError(f"layer {min(both)} is in ulsam_replace and in ulsam_after.")


class MobileNetV1Config(_MobileNetConfig):
    """Sizes and options of a MobileNet-V1.

    Args:
        num_channels: of an image.
        stem, stem_stride: channels and stride of the first convolution, which is layer 0.
        layers: channels and stride of each further layer, a depthwise and a 1 x 1 convolution.
        width: what all channels are multiplied by.
        dropout: before the classifier, in training.
        ulsam_replace, ulsam_after: layers that subspace attention replaces, or stands after.
        ulsam_groups, ulsam_norm: see `ULSAM`.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> MobileNetV1Config.preset("mobilenet-v1-ulsam").ulsam_replace
        [10]
    """

    model_type = "regard_mobilenet_v1"
    presets: ClassVar = {
        "mobilenet-v1-small": _V1_SMALL,
        "mobilenet-v1-small-ulsam": {**_V1_SMALL, "ulsam_replace": [3, 5]},
        "mobilenet-v1": {},
        "mobilenet-v1-ulsam": {"ulsam_replace": [10]},
    }

    dropout: float = 0.0
    layers: list[list[int]] | tuple[tuple[int, ...], ...] = tuple(tuple(x) for x in _V1_LAYERS)


class MobileNetV2Config(_MobileNetConfig):
    """Sizes and options of a MobileNet-V2.

    Args:
        num_channels: of an image.
        stem, stem_stride: channels and stride of the first convolution, which is layer 0.
        stages: of inverted residuals: expansion, channels, how many, stride of the first.
        last: channels of the last convolution.
        width: what channels are multiplied by, to multiples of 8; `last` where it is above 1.
        dropout: before the classifier, in training.
        ulsam_replace, ulsam_after: layers that subspace attention replaces, or stands after.
        ulsam_groups, ulsam_norm: see `ULSAM`.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> MobileNetV2Config.preset("mobilenet-v2-ulsam").ulsam_replace
        [13, 16]
    """

    model_type = "regard_mobilenet_v2"
    presets: ClassVar = {
        "mobilenet-v2-small": _V2_SMALL,
        "mobilenet-v2-small-ulsam": {**_V2_SMALL, "ulsam_replace": [5, 8]},
        "mobilenet-v2": {},
        "mobilenet-v2-ulsam": {"ulsam_replace": [13, 16]},
        "mobilenet-v2-ulsam-least": {"ulsam_replace": [12, 13, 15, 16]},
    }

    stages: list[list[int]] | tuple[tuple[int, ...], ...] = tuple(tuple(x) for x in _V2_STAGES)
    last: int = 1280


def rounded(channels: float) -> int:
    """Return the multiple of 8 that is nearest, or next above where that is 10 % less.

    Example:
        >>> rounded(24), rounded(33.6), rounded(11.2), rounded(3)
        (24, 32, 16, 8)
    """
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
