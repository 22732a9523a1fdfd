"""Induction: random tokens that repeat with a period, so that all but the first round can be known.

    c a f d  c a f d  c a f ...                   period 4: what follows is what followed before

The period differs from sequence to sequence and stays the same when sequences get longer: a model trained at
one length can be asked at another. Source: the repeated random tokens of Olsson et al., 2022, arXiv
2209.11895, here with several rounds. Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import RegardError

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Sequences of random tokens that repeat.

    Attributes:
        symbols: size of the vocabulary.
        shortest, longest: bounds of the period.

    Example:
        >>> task = Repeated(symbols=9, shortest=3, longest=3)
        >>> tokens, targets = task.batch(1, 7, torch.Generator().manual_seed(0))
        >>> tokens.tolist(), targets.tolist()
        ([[8, 0, 2, 8, 0, 2, 8]], [[-100, -100, 8, 0, 2, 8, -100]])
    """

    symbols: int = 32
    shortest: int = 8
    longest: int = 24

    def __post_init__(self) -> None:
        if self.symbols < 2 or not 1 <= self.shortest <= self.longest:
            raise RegardError(f"{self!r} cannot be drawn: it needs 2 symbols and periods from 1, in order.")

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens int64 [size, length], and targets, IGNORE where the next token is not known.

        Args:
            length: tokens in a sequence; more than the longest period.
        """
        if length <= self.longest:
            raise RegardError(f"length is {length}; it must be above the longest period, {self.longest}.")
        base = torch.randint(self.symbols, (size, self.longest), generator=generator)
        period = torch.randint(self.shortest, self.longest + 1, (size, 1), generator=generator)
        at = torch.arange(length).expand(size, -1)
        tokens = base.gather(1, at % period)
        targets = torch.full_like(tokens, IGNORE)
        known = at[:, :-1] >= period - 1
        targets[:, :-1] = torch.where(known, tokens[:, 1:], IGNORE)
        return tokens, targets
