"""Blocks that are found by their tag, and read by a slot whose name is the same in all of them.

    [tag | tag slot value ... | mark] [tag | ...] ...      questions: tag slot ?      answer: the value

Every block has another tag; it holds one token with the tag alone, one for each slot with tag, slot and a
random value, and a landmark. The slots of all blocks have the same names, so that a model must choose the
block first: keys that are unique in the whole text could be found without.

Tokens are sums of embeddings, so a batch holds the numbers of tag, slot, value and kind. Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from regard.errors import RegardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NONE, LANDMARK, QUESTION = 0, 1, 2


class TaggedText(NamedTuple):
    """A batch, int64 [B, T]: for each token the number of its tag, slot and value, 0 for none, and its kind.

    Attributes:
        kinds: `NONE`, `LANDMARK` or `QUESTION`.
        answers: int64 [B, Q], values from 1, of the questions, which stand last.
        places: int64 [B, Q], the block of each answer.
    """

    tags: Tensor
    slots: Tensor
    values: Tensor
    kinds: Tensor
    answers: Tensor
    places: Tensor


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """Sizes of the task.

    Attributes:
        block: tokens in a block; two of them are the bare tag and the landmark.
        tags: how many there are, at least as many as blocks in a text.
        symbols: number of values.
        questions: in a text, fewer than `block`.

    Example:
        >>> import torch
        >>> text = Tagged().batch(2, 3, torch.Generator().manual_seed(0))
        >>> text.tags.shape, text.answers.shape
        (torch.Size([2, 63]), torch.Size([2, 15]))
    """

    block: int = 16
    tags: int = 64
    symbols: int = 16
    questions: int = 15

    def __post_init__(self) -> None:
        if self.block < 3 or not 0 < self.questions < self.block or self.symbols < 2 or self.tags < 1:
            raise RegardError(f"{self!r} cannot be drawn: block from 3, fewer questions than that, 2 values.")

    def batch(self, count: int, blocks: int, generator: torch.Generator) -> TaggedText:
        """Return `count` texts of `blocks` blocks.

        Raises:
            RegardError: where there are fewer tags than blocks.
        """
        import torch

        if blocks > self.tags:
            raise RegardError(f"{blocks} blocks need as many tags, and there are {self.tags}.")
        slots = self.block - 2

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(1, high + 1, shape, generator=generator)

        own = 1 + torch.rand(count, self.tags, generator=generator).argsort(1)[:, :blocks]
        values = draw(self.symbols, count, blocks, slots)
        tags = own[..., None].repeat(1, 1, self.block)
        tags[..., -1] = 0
        names = torch.arange(1, slots + 1).expand(count, blocks, -1)
        ends = torch.zeros(count, blocks, 1, dtype=torch.int64)
        kinds = torch.zeros_like(tags)
        kinds[..., -1] = LANDMARK
        places = torch.randint(blocks, (count, self.questions), generator=generator)
        asked = torch.randint(slots, (count, self.questions), generator=generator)
        rows = torch.arange(count)[:, None]
        nothing = torch.zeros_like(places)
        parts = (
            (tags, own[rows, places]),
            (torch.cat([ends, names, ends], -1), 1 + asked),
            (torch.cat([ends, values, ends], -1), nothing),
            (kinds, nothing + QUESTION),
        )
        read = [torch.cat([text.flatten(1), question], 1) for text, question in parts]
        return TaggedText(read[0], read[1], read[2], read[3], values[rows, places, asked], places)
