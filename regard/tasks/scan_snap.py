"""Sequences in which some tokens tell the next one and others are shared by all: where attention learns.

    a last token m, a next token n of those that follow m, context tokens ~ P( . | n), each for itself

A context token is *distinct* where one next token has it, and *common* where all have. Token ids: common
ones, the distinct ones of each next token in turn, the last tokens, the next tokens.

Source: "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer" (Tian
et al., 2023, arXiv 2305.16380), sections 2 and 6, the settings Syn-Small and Syn-Medium. Status: agrees
with the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError

if TYPE_CHECKING:
    from torch import Generator, Tensor

LEAST, MOST = 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class TokenComposition:
    """Which tokens stand with which next token, and how often.

    Attributes:
        num_last: last tokens.
        next_per_last: next tokens of each last token, all as likely.
        num_common: tokens that every next token has, of weight 1 each.
        num_distinct: tokens that one next token has, for each.
        weights: of the distinct tokens; default evenly from 0.1 to 1.
        shared: a control in which every next token has the mean of all contexts, so that nothing tells it.

    Raises:
        RegardError: for no distinct token, a weight of 0 or less, or fewer than two next tokens in all.

    Example:
        >>> data = TokenComposition()
        >>> data.vocabulary, data.classes, round(float(data.contexts[0, :10].sum()), 3)
        (34, 2, 0.645)
    """

    num_last: int = 2
    next_per_last: int = 1
    num_common: int = 10
    num_distinct: int = 10
    weights: Sequence[float] | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if min(self.num_last, self.next_per_last) < 1 or self.classes < 2:
            raise RegardError(
                f"num_last is {self.num_last} and next_per_last {self.next_per_last}; there must be two next "
                "tokens in all, or there is nothing to tell apart."
            )
        if self.num_distinct < 1 or self.num_common < 0:
            raise RegardError(
                f"num_distinct is {self.num_distinct} and num_common {self.num_common}; they must be 1 or "
                "more, and 0 or more."
            )
        given = self.weights
        if given is not None and (len(given) != self.num_distinct or not all(w > 0 for w in given)):
            raise RegardError(
                f"weights is {list(given)}; it takes {self.num_distinct} numbers above 0, one for each "
                "distinct token."
            )

    @property
    def classes(self) -> int:
        """How many next tokens there are."""
        return self.num_last * self.next_per_last

    @property
    def context(self) -> int:
        """How many context tokens there are; their ids come first."""
        return self.num_common + self.classes * self.num_distinct

    @property
    def vocabulary(self) -> int:
        return self.context + self.num_last + self.classes

    @cached_property
    def contexts(self) -> npt.NDArray[np.float64]:
        """P(l | n), float64 [classes, vocabulary]; rows sum to 1."""
        own = np.linspace(LEAST, MOST, self.num_distinct) if self.weights is None else np.array(self.weights)
        table = np.zeros((self.classes, self.vocabulary))
        table[:, : self.num_common] = 1
        for number in range(self.classes):
            table[number, self.distinct(number)] = own
        table /= table.sum(1, keepdims=True)
        return np.tile(table.mean(0), (self.classes, 1)) if self.shared else table

    def distinct(self, number: int) -> slice:
        """Return the ids of the distinct tokens of a next token, counted from 0."""
        first = self.num_common + number * self.num_distinct
        return slice(first, first + self.num_distinct)

    def last_of(self, numbers: Tensor) -> Tensor:
        """Return the ids of the last tokens of next tokens, counted from 0."""
        return self.context + numbers // self.next_per_last

    def next_of(self, numbers: Tensor) -> Tensor:
        """Return the ids of next tokens, counted from 0."""
        return self.context + self.num_last + numbers

    def draw(self, count: int, length: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return sequences int64 [count, length], the last token last, and the next tokens, int64 [count].

        Raises:
            RegardError: for a length under 2.
        """
        import torch

        if length < 2 or count < 1:
            raise RegardError(f"count is {count} and length {length}; they must be at least 1 and 2.")
        numbers = torch.randint(self.classes, (count,), generator=generator)
        chances = torch.from_numpy(self.contexts)[numbers]
        tokens = torch.multinomial(chances, length - 1, replacement=True, generator=generator)
        return torch.cat([tokens, self.last_of(numbers)[:, None]], 1), self.next_of(numbers)
