"""Which tokens of a vision transformer are which patches of its image.

Tokens are the patches row by row from the top, behind a few others such as a class token or registers: where
the image is H x W and patches are h x w, the last (H / h) (W / w) tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.runtime.call import Call
from regard.runtime.planes import pixels_of

MOST_OTHERS = 16
Grid = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """The tokens of one image.

    Attributes:
        grid: height and width in patches.
        others: how many tokens stand in front of them.
        pixels: height and width of the image.
    """

    grid: Grid
    others: int
    pixels: Grid


def patches_of(call: Call) -> Patches | None:
    """Return which tokens of a call are patches, or None where they are not all those of one image."""
    size = _size(getattr(call.site.module, "config", None))
    image = pixels_of(call.run)
    if size is None or image is None or call.site.cross or call.key_length != call.query_length:
        return None
    pixels: Grid = (image.shape[2], image.shape[3])
    grid: Grid = (pixels[0] // size[0], pixels[1] // size[1])
    others = call.key_length - grid[0] * grid[1]
    if not 0 <= others <= MOST_OTHERS or len(image) != len(call.q) or not all(grid):
        return None
    return Patches(grid, others, pixels)


def _size(config: Any) -> Grid | None:
    given = getattr(config, "patch_size", None)
    if isinstance(given, int) and given > 0:
        return given, given
    if isinstance(given, list | tuple) and len(given) == 2:
        return int(given[0]), int(given[1])
    return None
