"""Small images of random colours, in which every pixel is to be given a label that depends on others.

    marker    one pixel carries a mark in one of the colours, and every pixel's label is that colour
    above     a pixel's label is the colour of the pixel `distance` rows above it; the top rows have none

Symbols 0 to colours - 1 are plain pixels, the next `colours` are marked ones. Source: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import RegardError

IGNORE = -100
KINDS = ("marker", "above")


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """A task on images of height x width pixels.

    Attributes:
        kind: `marker` or `above`.
        height, width: of an image.
        colours: how many there are; a guess is right once in so many.
        distance: rows between a pixel and the one that gives its label, for `above`.

    Example:
        >>> images, labels, _ = Pixels(kind="above", height=2, width=3).batch(1, torch.Generator())
        >>> bool((labels[0, 1] == images[0, 0]).all()), labels[0, 0].tolist()
        (True, [-100, -100, -100])
    """

    kind: str
    height: int = 8
    width: int = 8
    colours: int = 8
    distance: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RegardError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        for name, least in (("height", 2), ("width", 1), ("colours", 2)):
            if getattr(self, name) < least:
                raise RegardError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 1 <= self.distance < self.height:
            raise RegardError(f"distance is {self.distance}; it must be from 1 to {self.height - 1}.")

    @property
    def symbols(self) -> int:
        """Number of different pixels."""
        return 2 * self.colours

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return images and labels, int64 [size, height, width], and each pixel's part, int64 of that shape.

        A part is 0 before the marked pixel, row by row, and 1 from it on; 1 everywhere where there is none.
        A label is -100 where it does not count.
        """
        shape = (size, self.height, self.width)
        images = torch.randint(0, self.colours, shape, generator=generator)
        parts = torch.ones(shape, dtype=torch.int64)
        if self.kind == "above":
            labels = torch.full(shape, IGNORE)
            labels[:, self.distance :] = images[:, : -self.distance]
            return images, labels, parts
        colour = torch.randint(0, self.colours, (size,), generator=generator)
        place = torch.randint(0, self.height * self.width, (size,), generator=generator)
        images.view(size, -1)[torch.arange(size), place] = self.colours + colour
        parts = (torch.arange(self.height * self.width) >= place[:, None]).long().view(shape)
        return images, colour[:, None, None].expand(shape).clone(), parts
