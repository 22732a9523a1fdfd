"""Routing attention as specs: causal clusters, and balanced clusters as published."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from regard.attention.costs import Costs
from regard.attention.registry import Spec, get, mechanism
from regard.attention.routing.heads import BalancedHeads, RoutingHeads
from regard.attention.routing.options import (
    STARTS,
    Options,
    check_choice,
    check_count,
    check_decay,
    check_from_0,
)
from regard.attention.widths import head_count, key_width
from regard.errors import RegardError


@dataclass(frozen=True, kw_only=True)
class _Heads(Spec):
    """Which heads are local, and how centroids are kept."""

    module: ClassVar = RoutingHeads
    selection: ClassVar[str] = "causal"
    heads: int | None = None
    width: int | None = None
    local_heads: int | None = None
    window: int = 256
    clusters: int = 16
    cluster_size: int = 64
    norm: str = "layernorm"
    scale: float | None = None
    mask_self: bool = False
    decay: float = 0.999
    start: str = "noise"
    commitment: float = 1e-4

    def __post_init__(self) -> None:
        self.options()
        check_count("window", self.window, 1)
        if self.local_heads is not None:
            check_count("local_heads", self.local_heads, 0)
        if self.heads is not None:
            check_count("heads", self.heads, 1)
            self._local_of(self.heads)
        check_decay(self.decay)
        check_choice("start", self.start, STARTS)
        check_from_0("commitment", self.commitment)

    def options(self) -> Options:
        """Return what the cluster heads need to know."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {f.name for f in fields(Options)}
        return Options(selection=self.selection, **{n: v for n, v in given.items() if n in known})

    def build(self, site: Any = None) -> RoutingHeads:
        """Return the module of one layer.

        Raises:
            RegardError: where neither `heads` and `width` nor a model's layer say how many heads there are
                and how wide, or there are fewer than `local_heads`.
        """
        heads, width = head_count(self, self.heads, site), key_width(self, self.width, site)
        kind: type[RoutingHeads] = self.module
        own = self.options(), heads, self._local_of(heads), width, self.window
        return kind(*own, decay=self.decay, start=self.start, commitment=self.commitment)

    def _local_of(self, heads: int) -> int:
        local = heads // 2 if self.local_heads is None else self.local_heads
        if local > heads:
            raise RegardError(f"local_heads is {local}, of {heads} heads; it can be no more.")
        return local

    def lengths(self) -> tuple[int, ...]:
        return (0, 1, 7, 29)


SMALL: dict[str, Any] = {"heads": 4, "width": 8, "clusters": 3, "window": 5, "decay": 1.0}


@mechanism("routing")
@dataclass(frozen=True, kw_only=True)
class Routing(_Heads):
    """Attention to the last tokens of the same content clusters, found by online k-means, beside local heads.

    Attributes:
        heads: number of query heads; in a model the layer's.
        width: of a head's queries and keys; in a model the layer's.
        local_heads: how many heads, the last, see near blocks in place of clusters; default half of them.
        window: length of those blocks.
        clusters: C, centroids of a head.
        cluster_size: w, how many of the last members of a cluster a token sees.
        nearest: m, clusters that a token is in.
        norm: "layernorm", as published, or "l2", which leaves scores as the model has them.
        scale: factor on q k^T; default 1 with "layernorm", the model's with "l2".
        mask_self: whether a token sees itself only where it sees nothing else; for queries that are keys.
        decay: of the running means; 1 leaves the centroids where they are.
        start: centroids at "noise", or by k-means of the first batch in training, "lloyd".
        commitment: factor of the commitment loss in what `train` lowers.

    Example:
        >>> layer = Routing(heads=4, width=16, clusters=8, cluster_size=32).build()
        >>> layer.clusters.centroids.shape
        torch.Size([2, 8, 16])
    """

    costs: ClassVar = Costs(
        time="T (m w D + C D)", memory="T m w", step_time="m w D + C D + T", step_memory="T D"
    )
    nearest: int = 2

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(cluster_size=3, **SMALL),
            cls(cluster_size=5, nearest=3, norm="l2", local_heads=1, **SMALL),
            cls(cluster_size=12, nearest=1, mask_self=True, local_heads=0, **SMALL),
        )

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        full = {**SMALL, "clusters": 1, "local_heads": 0}
        return cls(nearest=1, norm="l2", cluster_size=max(1, length), **full), get("softmax")


@mechanism("balanced-routing")
@dataclass(frozen=True, kw_only=True)
class BalancedRouting(_Heads):
    """Attention inside clusters of equally many tokens, found by online k-means, beside local heads.

    Attributes:
        cluster_size: w, tokens of a cluster, all where there are fewer; C w is about the length.
        damping: what is added to the number of clusters by which the sum over them is divided.
        others: as in `Routing`.

    Example:
        >>> BalancedRouting(clusters=4, cluster_size=25).options().selection
        'topw'
    """

    module: ClassVar = BalancedHeads
    selection: ClassVar[str] = "topw"
    costs: ClassVar = Costs(time="C w^2 D + T C D", memory="C w^2 + T C")
    damping: float = 0.01

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(cluster_size=8, **SMALL),
            cls(cluster_size=9, norm="l2", mask_self=True, local_heads=1, damping=0.0, **SMALL),
        )

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        full = {**SMALL, "clusters": 1, "local_heads": 0}
        return cls(norm="l2", damping=0.0, cluster_size=max(1, length), **full), get("softmax")
