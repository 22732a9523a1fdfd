"""Sizes and options of HaloNet: those that timm has, the paper's family, and one for small images.

timm's, by its names: `halonet_h1`, `halonet26t`, `sehalonet33ts`, `halonet50ts`, `eca_halonext26ts`. The
paper's `halonet-h0` to `halonet-h7` are from a table that is not confirmed; `unconfirmed` names them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from regard.attention.halo import BORDERS
from regard.errors import RegardError
from regard.models.images.base import ImageConfig

STEMS, ACTS, CHANNELS = ("7x7", "tiered", "3x3"), ("relu", "silu"), ("", "se", "eca")
Counts = list[int] | tuple[int, ...]


def _every(depths: Counts) -> list[list[int]]:
    """Attention in every block."""
    return [list(range(depth)) for depth in depths]


def _paper(block: int, halo: int, values: float, width: float, third: int, final: int = 0) -> dict[str, Any]:
    depths = [3, 3, third, 3]
    return {
        "widths": [int(64 * width * 2**stage) for stage in range(4)], "depths": depths,
        "inner": [64, 128, 256, 512], "attends": _every(depths), "block": block, "halo": halo,
        "heads": [4, 8, 8, 8], "value_ratio": values, "num_features": final,
    }  # fmt: skip


_TIMM: dict[str, Any] = {"rel_stride": 1, "stem": "tiered"}
_RESNET: dict[str, Any] = {**_TIMM, "inner": [64, 128, 256, 512], "widths": [256, 512, 1024, 2048]}
_H1 = [3, 3, 10, 3]


class HaloNetConfig(ImageConfig):
    """Sizes and options of a HaloNet, a ResNet of bottlenecks with halo attention in some.

    Args:
        num_channels: of an image.
        widths, depths: channels of a stage's maps, and its blocks.
        inner: channels inside the bottlenecks of a stage.
        attends: which blocks of a stage, from 0, have halo attention; the others a 3 x 3 convolution.
        strides: of the first block of a stage.
        block, halo: of the attention.
        heads: of the attention, one number or one a stage.
        dim_head: width of queries and keys of a head; None for `inner` over `heads`.
        value_ratio: channels of all values over `inner`.
        border, pad, rel_stride: of the attention, see `HaloAttention`; rel_stride None for true offsets.
        stem: "7x7" or "3x3", one convolution, or "tiered", three of 3 x 3.
        stem_width, stem_stride: channels after the stem; stride of its first convolution.
        stem_pool: whether a 3 x 3 max pool of stride 2 ends the stem; without it the last of "tiered" has
            stride 2.
        act: "relu" or "silu".
        channel_attention: "", "se" or "eca", in blocks of convolutions.
        group_width: channels in a group of a 3 x 3 convolution; 0 for no groups.
        num_features: channels of a last 1 x 1 convolution; 0 for none.
        drop_path_rate: share of samples that skip a block in training, in the last; it rises to that.

    Attributes:
        unconfirmed: presets whose sizes are not confirmed by code or weights.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> HaloNetConfig.preset("halonet26t").attends
        [[], [], [1], [0, 1]]
    """

    model_type = "regard_halonet"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "halonet-small": {
            "widths": [64, 128], "depths": [2, 2], "inner": [32, 64], "attends": _every([2, 2]),
            "strides": [1, 2], "block": 4, "halo": 2, "heads": [2, 4], "stem": "3x3", "stem_width": 32,
            "stem_pool": False,
        },
        "halonet-h0": _paper(8, 3, 1, 0.5, 7),
        "halonet-h1": _paper(8, 3, 1, 1, 10),
        "halonet-h2": _paper(8, 3, 1, 1.25, 11),
        "halonet-h3": _paper(10, 3, 1, 1.5, 12, 1024),
        "halonet-h4": _paper(12, 2, 1, 3, 12, 1280),
        "halonet-h5": _paper(14, 2, 2.5, 2, 23, 1536),
        "halonet-h6": _paper(8, 4, 3, 2.75, 24, 1536),
        "halonet-h7": _paper(10, 4, 4, 3.5, 26, 2048),
        "halonet_h1": {
            "widths": [64, 128, 256, 512], "depths": _H1, "inner": [64, 128, 256, 512],
            "attends": _every(_H1), "rel_stride": 1,
        },
        "halonet26t": {
            **_RESNET, "depths": [2, 2, 2, 2], "attends": [[], [], [1], [0, 1]], "halo": 2,
        },
        "sehalonet33ts": {
            **_RESNET, "widths": [256, 512, 1024, 1536], "depths": [2, 3, 3, 2], "act": "silu",
            "attends": [[], [2], [2], [0, 1]], "stem_pool": False, "channel_attention": "se",
            "num_features": 1280,
        },
        "halonet50ts": {
            **_RESNET, "depths": [3, 4, 6, 3], "attends": [[], [3], [1, 3, 5], [1]], "act": "silu",
            "heads": [8, 4, 8, 8],
        },
        "eca_halonext26ts": {
            **_RESNET, "depths": [2, 2, 2, 2], "attends": [[], [], [1], [0, 1]], "halo": 2, "dim_head": 16,
            "act": "silu", "channel_attention": "eca", "group_width": 16,
        },
    }  # fmt: skip
    unconfirmed: ClassVar[frozenset[str]] = frozenset(f"halonet-h{number}" for number in range(8))

    widths: Counts = (64, 128, 256, 512)
    depths: Counts = (3, 3, 10, 3)
    inner: Counts = (64, 128, 256, 512)
    attends: list[Any] | tuple[Any, ...] = ((0, 1, 2), (0, 1, 2), tuple(range(10)), (0, 1, 2))
    strides: Counts = (1, 2, 2, 2)
    block: int = 8
    halo: int = 3
    heads: int | Counts = 8
    dim_head: int | None = None
    value_ratio: float = 1.0
    border: str = "zero"
    pad: str = "auto"
    rel_stride: int | None = None
    stem: str = "7x7"
    stem_width: int = 64
    stem_stride: int = 2
    stem_pool: bool = True
    act: str = "relu"
    channel_attention: str = ""
    group_width: int = 0
    num_features: int = 0
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        stages = len(self.widths)
        named = (self.depths, self.inner, self.attends, self.strides)
        if not stages or any(len(x) != stages for x in named):
            raise RegardError(
                f"widths {self.widths}, depths {self.depths}, inner {self.inner}, attends {self.attends} and "
                f"strides {self.strides} must name the same stages."
            )
        for name, known in (("stem", STEMS), ("act", ACTS), ("channel_attention", CHANNELS),
                            ("border", tuple(BORDERS)), ("pad", ("error", "auto"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise RegardError(f"{name} is {getattr(self, name)!r}; it must be one of {known}.")
        if isinstance(self.heads, list | tuple) and len(self.heads) != stages:
            raise RegardError(f"heads is {self.heads}; it must be one number or {stages}, one a stage.")
        for stage in range(stages):
            self._check_stage(stage)

    def _check_stage(self, stage: int) -> None:
        depth, inner = self.depths[stage], self.inner[stage]
        if any(layer not in range(depth) for layer in self.attends[stage]):
            raise RegardError(
                f"attends of stage {stage} is {list(self.attends[stage])}; the stage has blocks 0 to "
                f"{depth - 1}."
            )
        if self.strides[stage] not in (1, 2):
            raise RegardError(f"strides of stage {stage} is {self.strides[stage]}; it must be 1 or 2.")
        heads = self.heads_of(stage)
        if self.attends[stage] and (heads < 1 or self.values_of(stage) % heads or inner % heads):
            raise RegardError(
                f"inner of stage {stage} is {inner} and its values have {self.values_of(stage)} channels, "
                f"which {heads} heads do not divide."
            )
        if self.group_width and inner % self.group_width:
            raise RegardError(
                f"inner of stage {stage} is {inner}, which groups of {self.group_width} do not divide."
            )

    def heads_of(self, stage: int) -> int:
        """Return the heads of the attention of a stage."""
        return self.heads if isinstance(self.heads, int) else int(self.heads[stage])

    def values_of(self, stage: int) -> int:
        """Return the channels of all values of the attention of a stage."""
        return int(self.inner[stage] * self.value_ratio)
