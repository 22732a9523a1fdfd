"""What routing needs to know besides q, k, v and centroids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from regard.attention.routing.clusters import NORMS
from regard.errors import RegardError

SELECTIONS = ("causal", "topw")
STARTS = ("noise", "lloyd")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tokens are put into clusters, and attend there.

    Attributes:
        clusters: C, centroids of a head.
        cluster_size: w; by "topw" the tokens of a cluster, all where there are fewer, and by "causal" how
            many of the last members of a cluster a token sees. C w is about the length.
        selection: "causal": a token is in its `nearest` clusters, and sees the last w members of each; no
            later token moves an earlier output. "topw", as published: each centroid takes w tokens of the
            whole, so that earlier outputs depend on later tokens, and there is no decoding from a cache.
        nearest: m, clusters that a token is in, by "causal".
        norm: "layernorm": queries and keys are normalised without scale and bias, for choice and scores;
            "l2": to unit length, for the choice alone.
        scale: factor on q k^T; default 1 with "layernorm", 1 / sqrt(D) with "l2".
        mask_self: whether a token sees itself only where it sees nothing else; for queries that are keys.
        damping: what is added to the number of clusters by which the sum over them is divided, by "topw".
    """

    clusters: int = 16
    cluster_size: int = 64
    selection: str = "causal"
    nearest: int = 2
    norm: str = "layernorm"
    scale: float | None = None
    mask_self: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("clusters", "cluster_size", "nearest"):
            check_count(name, getattr(self, name), 1)
        if self.selection == "causal" and self.nearest > self.clusters:
            raise RegardError(f"nearest is {self.nearest}, of {self.clusters} clusters; it can be no more.")
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("norm", self.norm, NORMS)
        if self.scale is not None and not (_number(self.scale) and self.scale > 0):
            raise RegardError(f"scale is {self.scale!r}; it must be a number above 0, or None.")
        check_from_0("damping", self.damping)

    def factor(self, width: int, given: float | None = None) -> float:
        """Return the factor on q k^T for heads of a width; `given` is what the model asks for."""
        if self.scale is not None:
            return self.scale
        if self.norm == "layernorm":
            return 1.0
        return width**-0.5 if given is None else given


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number from `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse what is not among the known."""
    if value not in known:
        raise RegardError(f"{name} is {value!r}; it must be {' or '.join(known)}.")


def check_from_0(name: str, value: Any) -> None:
    """Refuse what is no number from 0."""
    if not _number(value) or value < 0:
        raise RegardError(f"{name} is {value!r}; it must be a number from 0.")


def check_decay(value: Any) -> None:
    """Refuse a decay of running means that is not from 0 to 1."""
    if not _number(value) or not 0 <= value <= 1:
        raise RegardError(f"decay is {value!r}; it must be a number from 0 to 1.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
