"""Maps of one layer over images, for the report: see `panels`. Nothing here draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.errors import ShapeMismatch


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePanel:
    """The maps of one layer over one or more images.

    Attributes:
        site: alias of the layer.
        kind: "probability", "factor" or "gate"; the last is drawn on a scale that diverges from zero.
        head: what has a map of its own: "head", "channel" or "group".
        maps: [heads, H, W] an image.
        pixels: the images, [C, H, W] each; empty where they are not known.
        rows: [heads, others + positions, H, W] an image, of a layer with queries; may be empty.
        queries: height and width of the plane of the queries, or None.
        at: which positions of it have rows, y W + x.
        others: how many tokens that are no position have rows, before those of the positions.

    Raises:
        ShapeMismatch: where the arrays do not fit together.
    """

    site: str
    kind: str
    maps: Sequence[Any]
    head: str = "head"
    pixels: Sequence[Any] = ()
    rows: Sequence[Any] = ()
    queries: tuple[int, int] | None = None
    at: Sequence[int] = ()
    others: int = 0

    def __post_init__(self) -> None:
        maps = [np.asarray(x, dtype=np.float32) for x in self.maps]
        rows = [np.asarray(x, dtype=np.float32) for x in self.rows]
        if not maps or any(x.ndim != 3 or x.shape != maps[0].shape for x in maps):
            raise ShapeMismatch(f"maps are [heads, H, W] of one shape, and are {[x.shape for x in maps]}.")
        heads, *grid = maps[0].shape
        wanted = (heads, self.others + len(self.at), *grid)
        if any(x.shape != wanted for x in rows):
            raise ShapeMismatch(f"rows must be {wanted}, and are {[x.shape for x in rows]}.")
        object.__setattr__(self, "maps", maps)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "pixels", [np.asarray(x, dtype=np.float32) for x in self.pixels])
