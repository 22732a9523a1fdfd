"""Sizes and options of NAT and DiNAT: those of the published models, and nano for images of 32 x 32."""

from __future__ import annotations

from typing import Any, ClassVar

from regard.errors import RegardError
from regard.models.images.base import ImageConfig

_SMALLER = {"embed_dim": 64, "num_heads": [2, 4, 8, 16], "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_LARGER = {"depths": [3, 4, 18, 5], "mlp_ratio": 2.0, "layer_scale": 1e-5}
_SIZES: dict[str, dict[str, Any]] = {
    "nano": {
        "embed_dim": 32, "num_heads": [2, 4], "depths": [2, 2], "kernel_size": 3, "mlp_ratio": 2.0,
        "drop_path_rate": 0.0,
    },
    "mini": {**_SMALLER, "depths": [3, 4, 6, 5]},
    "tiny": {**_SMALLER, "depths": [3, 4, 18, 5]},
    "small": {**_LARGER, "embed_dim": 96, "num_heads": [3, 6, 12, 24], "drop_path_rate": 0.3},
    "base": {**_LARGER, "embed_dim": 128, "num_heads": [4, 8, 16, 32], "drop_path_rate": 0.5},
}  # fmt: skip


def _dilated(size: dict[str, Any]) -> dict[str, Any]:
    """The same with every second layer dilated, so that windows reach over a map of 224 / 4 and less."""
    far = (8, 4, 2, 1)
    dilations = [
        [1 if i % 2 == 0 else far[level] for i in range(n)] for level, n in enumerate(size["depths"])
    ]
    return {**size, "dilations": dilations}


class NATConfig(ImageConfig):
    """Sizes and options of a NAT or DiNAT for images.

    Args:
        num_channels: of an image.
        embed_dim: width of the first level; every level doubles it.
        depths, num_heads: layers and heads of each level.
        kernel_size: of the windows, odd.
        dilations: of each layer of each level; None for 1 everywhere, which is NAT.
        mlp_ratio: inner width of the MLPs over the width.
        qkv_bias: whether the projections have a bias.
        layer_scale: what the scales of the branches begin with; None for branches without.
        drop_path_rate: share of samples that skip a branch in training, in the last layer; it rises to that.
        dropout: of outputs of projections, in training.
        initializer_range: standard deviation of fresh weights.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> NATConfig.preset("dinat-mini").dilations[0]
        [1, 8, 1]
    """

    model_type = "regard_nat"
    presets: ClassVar = {
        **{f"nat-{name}": size for name, size in _SIZES.items()},
        **{f"dinat-{name}": _dilated(size) for name, size in _SIZES.items()},
    }

    embed_dim: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 5)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: list[Any] | tuple[Any, ...] | None = None
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path_rate: float = 0.2
    dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise RegardError(
                f"depths {self.depths} and num_heads {self.num_heads} must name the same levels."
            )
        for level, heads in enumerate(self.num_heads):
            if heads < 1 or self.embed_dim * 2**level % heads:
                width = self.embed_dim * 2**level
                raise RegardError(
                    f"the width of level {level} is {width}, which {heads} heads do not divide."
                )
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise RegardError(f"kernel_size is {self.kernel_size}; it must be odd, from 3.")
        if self.dilations is not None and [len(level) for level in self.dilations] != list(self.depths):
            raise RegardError(f"dilations must be {list(self.depths)} numbers a level.")

    def dilation(self, level: int, layer: int) -> int:
        """Return the dilation of a layer of a level, both from 0."""
        return 1 if self.dilations is None else int(self.dilations[level][layer])
