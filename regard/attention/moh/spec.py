"""What a user configures of mixture of heads, for one layer, a stack of them, or as published.

The published splits are those of the official code (SkyworkAI/MoH): of MoH-ViT one a stage of TransNeXt, of
MoH-DiT one a layer. A layer with active = 0 weights all of its heads and routes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from regard.attention.costs import READS_CACHE
from regard.attention.head_router import Kind, Preset, check_options, check_split, spread
from regard.attention.moh.layer import MoHAttention, check_layer
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError

Split = tuple[list[int], list[int], list[int]]


def _vit(dims: list[int], heads: list[int], shared: list[int], active: list[int]) -> dict[str, Any]:
    return {"dim": dims, "heads": heads, "shared": shared, "active": active, "causal": False, "bias": True}


def _dit(dim: int, head_dim: int, *parts: tuple[int, int, int, int]) -> dict[str, Any]:
    """Parts are (layers, heads, shared, active)."""
    split = [[part[i] for part in parts for _ in range(part[0])] for i in (1, 2, 3)]
    return {
        "dim": dim, "heads": split[0], "shared": split[1], "active": split[2], "head_dim": head_dim,
        "causal": False, "bias": True,
    }  # fmt: skip


SMALL, BASE = [72, 144, 288, 576], [96, 192, 384, 768]
PUBLISHED: dict[str, dict[str, Any]] = {
    "vit-s-80": _vit(SMALL, [3, 6, 12, 24], [3, 6, 3, 8], [0, 0, 6, 12]),
    "vit-s-75": _vit(SMALL, [3, 6, 12, 24], [3, 6, 3, 4], [0, 0, 6, 12]),
    "vit-b-75": _vit(BASE, [4, 8, 16, 32], [4, 8, 4, 5], [0, 0, 8, 16]),
    "vit-b-50": _vit(BASE, [4, 8, 16, 32], [2, 2, 2, 4], [2, 4, 6, 8]),
    "dit-xl-90": _dit(1152, 72, (9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    "dit-xl-75": _dit(1152, 72, (9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)),
    "dit-l-90": _dit(1024, 64, (8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)),
    "dit-l-75": _dit(1024, 64, (8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)),
    "dit-b-90": _dit(768, 64, (5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)),
    "dit-b-75": _dit(768, 64, (2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)),
    "dit-s-90": _dit(384, 64, (8, 6, 3, 2), (4, 6, 6, 0)),
    "dit-s-75": _dit(384, 64, (2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)),
}


@mechanism("mixture-of-heads")
@dataclass(frozen=True, kw_only=True)
class MixtureOfHeads(Spec):
    """Softmax attention in which every token chooses and weights its heads; a layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of query heads.
        shared: how many of them, the first, are always on.
        active: how many of the others a token uses; from 1, and 0 where there are none.
        kind: "learned", "query_norm", "output_norm" or "random".
        preset: gates of the "official" code, or of the "paper", which are smaller.
        fine_tune: whether gates begin at 1.
        head_dim: width of a head; default dim / heads.
        kv_heads: number of key heads; default the same.
        causal: whether a position sees no later one.
        positions: "rotary" or None.
        bias: whether projections have one.
        sparse: whether heads that are off are left out; the result is the same.

    Example:
        >>> layer = MixtureOfHeads(dim=32, heads=8, shared=2, active=3).build()
        >>> layer(layer.queries.weight[None]).shape
        torch.Size([1, 32, 32])
        >>> [(s.heads, s.shared, s.active) for s in MixtureOfHeads.published("vit-s-80")]
        [(3, 3, 0), (6, 6, 0), (12, 3, 6), (24, 8, 12)]
    """

    module: ClassVar = MoHAttention
    costs: ClassVar = READS_CACHE
    dim: int
    heads: int
    shared: int
    active: int
    kind: Kind = "learned"
    preset: Preset = "official"
    fine_tune: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    causal: bool = True
    positions: str | None = None
    bias: bool = False
    sparse: bool = True

    def __post_init__(self) -> None:
        check_split(self.heads, self.shared, self.active)
        check_options(self.dim, self.kind, self.preset, self.fine_tune)
        check_layer(
            self.dim, self.heads, self.head_dim, self.kv_heads, self.positions, self.sparse, self.kind
        )

    def build(self, site: Any = None) -> MoHAttention:
        options = {name: getattr(self, name) for name in OPTIONS}
        return MoHAttention(self.dim, self.heads, self.shared, self.active, **options)

    @classmethod
    def stack(
        cls,
        *,
        dim: int | Sequence[int],
        heads: int | Sequence[int],
        shared: int | Sequence[int],
        active: int | Sequence[int],
        **options: Any,
    ) -> tuple[MixtureOfHeads, ...]:
        """Return one spec a layer; a number stands for all layers.

        Raises:
            RegardError: where lists differ in length, or there is none.
        """
        given = {"dim": dim, "heads": heads, "shared": shared, "active": active}
        split: dict[str, list[Any]] = spread(given)
        return tuple(
            cls(**{name: numbers[i] for name, numbers in split.items()}, **options)
            for i in range(len(split["heads"]))
        )

    @classmethod
    def published(cls, name: str) -> tuple[MixtureOfHeads, ...]:
        """Return one spec a layer (DiT) or stage (ViT) of a published model, one of `PUBLISHED`.

        Raises:
            RegardError: where there is none of that name.
        """
        if name not in PUBLISHED:
            raise RegardError(f"no published split {name!r}; they are {', '.join(PUBLISHED)}.")
        return cls.stack(**PUBLISHED[name])

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=12, heads=6, shared=2, active=2),
            cls(dim=10, heads=5, shared=1, active=3, head_dim=4, preset="paper"),
            cls(dim=12, heads=4, shared=0, active=2, kv_heads=2, positions="rotary", head_dim=6, bias=True),
            cls(dim=12, heads=3, shared=3, active=0),
            cls(dim=18, heads=9, shared=4, active=5, kind="query_norm"),
        )


OPTIONS = (
    "kind", "preset", "fine_tune", "head_dim", "kv_heads", "causal", "positions", "bias", "sparse",
)  # fmt: skip
