"""What image models of equal patches share: an image cut into patches, one map of one size after each layer.

x = conv(pixels), kernel and stride p         [B, d, H, W] of images [B, C, H p, W p]
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from regard.errors import RegardError, ShapeMismatch
from regard.models.images.base import ImageConfig, ImageModel


class PatchConfig(ImageConfig):
    """Sizes of a model of equal patches.

    Args:
        image_size: height and width of an image in pixels; one number for both.
        patch_size: side of a patch in pixels; it divides both.
        hidden_size: width of a patch's features.
        num_hidden_layers: how many layers.

    Raises:
        RegardError: where a number is none from 1, or patches do not divide the image.
    """

    counts: ClassVar[tuple[str, ...]] = ("patch_size", "hidden_size", "num_hidden_layers")

    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int = 16
    hidden_size: int = 192
    num_hidden_layers: int = 12

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in self.counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        size = self.image_size
        pair = [size, size] if isinstance(size, int) else list(size)
        if len(pair) != 2 or min(pair) < 1 or any(side % self.patch_size for side in pair):
            told = " x ".join(str(side) for side in pair)
            raise RegardError(f"image_size is {told}, which patches of {self.patch_size} do not divide.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // self.patch_size, width // self.patch_size


class PatchModel(ImageModel):
    """An image model of equal patches.

    Attributes:
        fixed: whether images must be of the config's size; otherwise of any that patches divide.
    """

    config: PatchConfig
    fixed: ClassVar[bool] = True

    @property
    def smallest_image(self) -> int:
        return int(self.config.patch_size)

    def _check_images(self, pixels: Tensor) -> None:
        super()._check_images(pixels)
        (height, width), patch = pixels.shape[2:], self.config.patch_size
        wanted = tuple(side * patch for side in self.config.grid)
        if self.fixed and (height, width) != wanted:
            raise ShapeMismatch(
                f"images are {height} x {width} pixels; this {type(self).__name__} was built for "
                f"{wanted[0]} x {wanted[1]}."
            )
        if height % patch or width % patch:
            raise ShapeMismatch(
                f"images are {height} x {width} pixels, which patches of {patch} do not divide."
            )
