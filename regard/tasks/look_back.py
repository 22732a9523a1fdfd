"""Look back: every position is told how far back to look, and answers with the symbol that stood there.

    answer_i = symbol_{i - 1 - task_i}         task_i from 0, drawn anew at every position

One head can look one way back at a time. A layer with as many heads as tasks and heads too narrow to tell
tasks and places apart is helped by using other heads at other positions.

Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from regard.errors import RegardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LookBackText(NamedTuple):
    """Symbols, tasks and answers, int64 [B, T] each; an answer is -100 where its place is before the text."""

    symbols: Tensor
    tasks: Tensor
    answers: Tensor


@dataclass(frozen=True, kw_only=True)
class LookBack:
    """The task of given sizes.

    Attributes:
        symbols: number of symbols.
        tasks: the farthest place is this many back.
        length: positions of a text.

    Example:
        >>> import torch
        >>> text = LookBack(length=12).batch(3, torch.Generator().manual_seed(0))
        >>> row, at = 1, 9
        >>> back = 1 + int(text.tasks[row, at])
        >>> bool(text.answers[row, at] == text.symbols[row, at - back])
        True
    """

    symbols: int = 16
    tasks: int = 8
    length: int = 32

    def __post_init__(self) -> None:
        for name, least in (("symbols", 2), ("tasks", 1), ("length", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")

    def batch(self, count: int, generator: torch.Generator) -> LookBackText:
        """Return `count` texts."""
        import torch

        shape = (count, self.length)
        symbols = torch.randint(self.symbols, shape, generator=generator)
        tasks = torch.randint(self.tasks, shape, generator=generator)
        places = torch.arange(self.length) - 1 - tasks
        answers = symbols.gather(1, places.clamp(min=0)).masked_fill(places < 0, -100)
        return LookBackText(symbols, tasks, answers)
