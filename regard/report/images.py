"""Maps over images as the page's script reads them: a byte a number, compressed, and the images themselves.

A head's maps, and its rows, are coded against the largest of its own: code = round(255 sqrt(w / scale)), or
of a gate, which has either sign, sign(w) round(127 sqrt(|w| / scale)); a number is then off by at most 0.008
of the head's largest. Of layers whose every channel has a map of its own, some channels are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from regard.lens.image_drawing import seen_pixels
from regard.report.pack import encoded
from regard.runtime.image_panel import ImagePanel
from regard.runtime.panels import Head

Floats = npt.NDArray[np.floating[Any]]
Json = dict[str, Any]
MOST_HEADS = 24
ROWS_BUDGET = 2_000_000
LARGEST_SIDE = 512


@dataclass(frozen=True)
class Kept:
    """Which heads of a layer the page has, ascending, and of how many."""

    heads: tuple[int, ...]
    of: int
    word: str

    def labels(self) -> list[str] | None:
        """Names for the page; None where all heads are there under their numbers."""
        if self.word == "head" and len(self.heads) == self.of:
            return None
        return [f"{self.word} {number}" for number in self.heads]


def kept_of(panel: ImagePanel, named: Sequence[Head]) -> Kept:
    """Choose what the page has of a layer: all heads, or of many those named and those that vary most."""
    mean = np.mean(panel.maps, 0)
    count = len(mean)
    chosen = list(range(count))
    if count > MOST_HEADS:
        first = [head for site, head in named if site == panel.site and head < count]
        order = np.argsort(-mean.std((1, 2)), kind="stable").tolist()
        chosen = sorted(list(dict.fromkeys([*first, *order]))[:MOST_HEADS])
    return Kept(tuple(chosen), count, panel.head)


def pictures_json(panels: Sequence[ImagePanel]) -> list[Json]:
    """Return the images that panels are about, as RGB bytes, at most 512 pixels a side."""
    found = next((panel.pixels for panel in panels if len(panel.pixels)), ())
    return [_picture(np.asarray(pixels)) for pixels in found]


def _picture(pixels: Floats) -> Json:
    image = seen_pixels(torch.from_numpy(np.ascontiguousarray(pixels)))
    height, width = image.shape[1:]
    step = -(-max(height, width) // LARGEST_SIDE)
    codes = (image[:, ::step, ::step] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return {
        "height": height, "width": width, "shape": list(codes.shape[:2]), "data": encoded(codes.tobytes()),
    }  # fmt: skip


def layers_json(panels: Sequence[ImagePanel], kept: dict[str, Kept], rows: dict[str, int]) -> list[Json]:
    """Return the maps of each layer; rows of positions as far as they fit, in ever wider steps.

    Args:
        kept: by site, which heads.
        rows: by site, its row on the page.
    """
    stride = 1
    while True:
        layers = [_layer(panel, kept[panel.site], rows[panel.site], stride) for panel in panels]
        size = sum(len(part["data"]) for layer in layers for part in layer["rows"])
        if size <= ROWS_BUDGET or stride >= 16:
            return layers
        stride *= 2


def _layer(panel: ImagePanel, kept: Kept, row: int, stride: int) -> Json:
    signed = panel.kind == "gate"
    heads = list(kept.heads)
    places = _thinned(panel, stride)
    grid = panel.maps[0].shape[1:]
    chosen = [*range(panel.others), *(panel.others + i for i in places)]
    queries = panel.queries or grid
    return {
        "row": row, "kind": panel.kind, "word": panel.head, "of": kept.of, "grid": list(grid),
        "signed": signed,
        "maps": [_coded(maps[heads], signed) for maps in panel.maps],
        "mean": [_coded(np.abs(maps).mean(0)[None], False) for maps in panel.maps],
        "rows": [_coded(found[heads][:, chosen], False) for found in panel.rows],
        "queries": list(queries), "at": [int(panel.at[i]) for i in places], "others": panel.others,
    }  # fmt: skip


def _coded(values: Floats, signed: bool) -> Json:
    """Codes of [heads, ..] against each head's largest."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float32), posinf=0.0, neginf=0.0)
    flat = values.reshape(len(values), -1)
    scales = np.abs(flat).max(1, initial=0.0)
    shares = np.sqrt(np.abs(flat) / np.where(scales > 0, scales, 1)[:, None])
    codes = np.round(shares * 255).astype(np.uint8)
    if signed:
        codes = (np.sign(flat) * np.round(shares * 127)).astype(np.int8).view(np.uint8)
    return {"scales": [float(f"{s:.6g}") for s in scales], "data": encoded(codes.tobytes())}


def _thinned(panel: ImagePanel, stride: int) -> list[int]:
    """Which positions are left in a step that is `stride` times wider along both axes."""
    if not panel.rows or panel.queries is None:
        return []
    width = panel.queries[1]
    down = sorted({at // width for at in panel.at})[stride // 2 :: stride] or [panel.at[0] // width]
    across = sorted({at % width for at in panel.at})[stride // 2 :: stride] or [panel.at[0] % width]
    return [i for i, at in enumerate(panel.at) if at // width in down and at % width in across]
