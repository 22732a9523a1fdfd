"""Sizes and options of VAN: those of the published models, and small for images of 8 x 8 to 32 x 32."""

from __future__ import annotations

from typing import Any, ClassVar

from regard.errors import RegardError
from regard.models.images.base import ImageConfig

_NARROW, _MIDDLE = [32, 64, 160, 256], [64, 128, 320, 512]
_SIZES: dict[str, tuple[list[int], list[int], float]] = {
    "b0": (_NARROW, [3, 3, 5, 2], 0.1),
    "b1": (_MIDDLE, [2, 2, 4, 2], 0.1),
    "b2": (_MIDDLE, [3, 3, 12, 3], 0.1),
    "b3": (_MIDDLE, [3, 5, 27, 3], 0.2),
    "b4": (_MIDDLE, [3, 6, 40, 3], 0.2),
    "b5": ([96, 192, 480, 768], [3, 3, 24, 3], 0.2),
    "b6": ([96, 192, 384, 768], [6, 6, 90, 6], 0.2),
}


class VANConfig(ImageConfig):
    """Sizes and options of a visual attention network.

    Args:
        num_channels: of an image.
        widths, depths, mlp_ratios: channels, blocks and inner over outer channels of each stage.
        strides: by which each stage makes its map smaller; the kernel is 7 x 7 for 4 and more, else 3 x 3.
        kernel, dilation: see `LargeKernelAttention`.
        layer_scale: what the scales of the branches begin with.
        drop_path_rate: share of samples that skip a branch in training, in the last block; it rises to that.
            Published for B0 to B3; 0.2 above is our choice.
        dropout: in the MLPs, in training.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> VANConfig.preset("van-b6").widths
        [96, 192, 384, 768]
    """

    model_type = "regard_van"
    presets: ClassVar = {
        "van-small": {
            "widths": [24, 48, 96], "depths": [1, 2, 1], "mlp_ratios": [4, 4, 4], "strides": [2, 2, 2],
            "drop_path_rate": 0.0, "layer_scale": 0.1,
        },
        **{
            f"van-{name}": {"widths": widths, "depths": depths, "drop_path_rate": rate}
            for name, (widths, depths, rate) in _SIZES.items()
        },
    }  # fmt: skip

    widths: list[int] | tuple[int, ...] = (32, 64, 160, 256)
    depths: list[int] | tuple[int, ...] = (3, 3, 5, 2)
    mlp_ratios: list[float] | tuple[float, ...] = (8, 8, 4, 4)
    strides: list[int] | tuple[int, ...] = (4, 2, 2, 2)
    kernel: int = 21
    dilation: int = 3
    layer_scale: float = 0.01
    drop_path_rate: float = 0.1
    dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        told = {"widths": self.widths, "depths": self.depths, "mlp_ratios": self.mlp_ratios}
        for name, values in told.items():
            if len(values) != len(self.strides) or not values:
                raise RegardError(
                    f"{name} has {len(values)} numbers and strides {len(self.strides)}; a stage has one each."
                )
        for name, numbers in (("widths", self.widths), ("depths", self.depths), ("strides", self.strides)):
            if not all(isinstance(n, int) and n >= 1 for n in numbers):
                raise RegardError(f"{name} is {numbers}; it must be whole numbers from 1.")
