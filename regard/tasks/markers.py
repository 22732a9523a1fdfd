"""Markers among decoys: one marker in a long sequence, whose colour is the label.

    f f d3 f f m5 f d1 f ...            label 5: the colour of the only marker m; d are decoys, f filler

Decoys have the same colours as the marker and are of another type, so that a mean over all tokens says
little of the label: a model has to single one token out of `length`. There is no order in it, and no
positions are needed. Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import RegardError


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Sequences with one marker each.

    Attributes:
        length: tokens in a sequence.
        colours: number of labels.
        decoys: share of the tokens that are decoys.
        fillers: number of tokens that mean nothing.

    Example:
        >>> tokens, labels = Markers(length=32).batch(4, torch.Generator().manual_seed(0))
        >>> tokens.shape, bool(((tokens < 8).sum(1) == 1).all())
        (torch.Size([4, 32]), True)
    """

    length: int = 256
    colours: int = 8
    decoys: float = 0.12
    fillers: int = 16

    def __post_init__(self) -> None:
        if self.length < 2 or self.colours < 2 or self.fillers < 1 or not 0 <= self.decoys < 1:
            raise RegardError(
                f"{self!r} cannot be drawn: it needs 2 tokens, 2 colours and a filler at least."
            )

    @property
    def symbols(self) -> int:
        """Size of the vocabulary: markers, then decoys, then fillers."""
        return 2 * self.colours + self.fillers

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [size, length] and labels int64 [size]."""

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        tokens = draw(2 * self.colours, self.symbols, size, self.length)
        hidden = torch.rand(size, self.length, generator=generator) < self.decoys
        tokens = torch.where(hidden, draw(self.colours, 2 * self.colours, size, self.length), tokens)
        labels, places = draw(0, self.colours, size), draw(0, self.length, size, 1)
        return tokens.scatter(1, places, labels[:, None]), labels
