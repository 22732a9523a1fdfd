"""Sizes and options of BiFormer: those of the published models, and nano for images of 8 x 8 to 32 x 32."""

from __future__ import annotations

from typing import Any, ClassVar

from regard.errors import RegardError
from regard.models.images.base import ImageConfig

_DEEP: dict[str, Any] = {"depths": [4, 4, 18, 4]}
_WIDE: dict[str, Any] = {"embed_dims": [96, 192, 384, 768]}
STEMS, STRIDES = ("convolutions", "patch"), (1, 2, 4)


class BiFormerConfig(ImageConfig):
    """Sizes and options of a BiFormer.

    Args:
        num_channels: of an image.
        embed_dims, depths: width and layers of each stage.
        topks: regions that a region attends to, of each stage; 0 for attention to the whole map.
        regions: along each side of every map, of stages whose topk is not 0; a number, or one a stage. The
            published models have 7 for classification, 16 for detection and 8 for segmentation.
        head_dim: width of a head where regions are chosen.
        whole_heads: heads of a stage whose topk is 0; the published models have 8 at any width.
        mlp_ratio: inner width of the MLPs over the width.
        lepe: width of the convolution beside the attention, odd.
        position: width of the convolution before each layer, odd; 0 for none.
        stem: "convolutions", two of 3 x 3, or "patch", one that does not overlap; stages are joined alike.
        stem_stride: 4, 2 or 1, how much smaller the first map is than the image.
        mask_padding: whether padding of maps that regions do not divide is hidden; the official code, with
            its `auto_pad`, attends to it.
        drop_path_rate: share of samples that skip a branch in training, in the last layer; it rises to that.
        initializer_range: standard deviation of fresh linear weights.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> BiFormerConfig.preset("biformer-base").embed_dims
        [96, 192, 384, 768]
    """

    model_type = "regard_biformer"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "biformer-nano": {
            "embed_dims": [32, 64], "depths": [2, 2], "topks": [4, 0], "regions": 4, "head_dim": 16,
            "whole_heads": 4, "mlp_ratio": 2.0, "lepe": 3, "stem_stride": 2, "drop_path_rate": 0.0,
        },
        "biformer-tiny": {},
        "biformer-small": {**_DEEP, "drop_path_rate": 0.15},
        "biformer-base": {**_DEEP, **_WIDE},
        "biformer-stl": {**_WIDE, "depths": [2, 2, 6, 2], "mlp_ratio": 4.0, "position": 0, "stem": "patch"},
    }  # fmt: skip

    embed_dims: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 8, 2)
    topks: list[int] | tuple[int, ...] = (1, 4, 16, 0)
    regions: int | list[int] | tuple[int, ...] = 7
    head_dim: int = 32
    whole_heads: int = 8
    mlp_ratio: float = 3.0
    lepe: int = 5
    position: int = 3
    stem: str = "convolutions"
    stem_stride: int = 4
    mask_padding: bool = True
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        stages = len(self.embed_dims)
        if not stages or not len(self.depths) == len(self.topks) == stages:
            raise RegardError(
                f"embed_dims {self.embed_dims}, depths {self.depths} and topks {self.topks} must name the "
                "same stages."
            )
        if isinstance(self.regions, list | tuple) and len(self.regions) != stages:
            raise RegardError(f"regions is {self.regions}; it must be one number or {stages}, one a stage.")
        if self.stem not in STEMS or self.stem_stride not in STRIDES:
            raise RegardError(
                f"stem is {self.stem!r} and stem_stride {self.stem_stride!r}; they must be of {STEMS} and "
                f"{STRIDES}."
            )
        if self.position and (self.position < 0 or not self.position % 2):
            raise RegardError(f"position is {self.position}; it must be odd, or 0 for none.")
        for stage in range(stages):
            self.heads_of(stage)

    def regions_of(self, stage: int) -> int:
        """Return the regions along each side of the maps of a stage."""
        return self.regions if isinstance(self.regions, int) else int(self.regions[stage])

    def heads_of(self, stage: int) -> int:
        """Return the heads of a stage."""
        width = int(self.embed_dims[stage])
        heads = width // self.head_dim if self.topks[stage] else self.whole_heads
        if heads < 1 or width % heads or (self.topks[stage] and width % self.head_dim):
            told = f"heads of {self.head_dim}" if self.topks[stage] else f"{self.whole_heads} heads"
            raise RegardError(f"embed_dims of stage {stage} is {width}, which {told} do not divide.")
        return heads
