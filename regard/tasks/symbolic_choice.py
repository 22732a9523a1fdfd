"""Multiple choice among symbols: which label stands before the option that equals the question?

    BOS  7  A 3  B 7  C 12  D 9  SEP SEP       -> B

Labels are A to D in this order, or four of 26 letters, drawn anew. A model trained on both from scratch
answers in minutes on a CPU, so that how it does so can be looked into.

Status: our choice, after the form of Lieberum et al., 2023, arXiv 2307.09458.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from regard.errors import RegardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BEGIN, FIRST, SECOND, LETTERS = 0, 1, 2, 26
KINDS = ("ordered", "random")


class SymbolicQuestions(NamedTuple):
    """Token ids [B, T], label tokens of each question in its order [B, options], and which is right [B]."""

    ids: Tensor
    labels: Tensor
    right: Tensor

    @property
    def answers(self) -> Tensor:
        """The token that must follow, int64 [B]."""
        return self.labels.gather(1, self.right[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True)
class SymbolicChoice:
    """The task of given sizes.

    Attributes:
        contents: number of symbols that options are drawn from.
        options: how many a question has.

    Example:
        >>> import torch
        >>> task = SymbolicChoice()
        >>> asked = task.batch(2, "ordered", torch.Generator().manual_seed(0))
        >>> asked.ids.shape, task.vocabulary
        (torch.Size([2, 12]), 49)
        >>> options = asked.ids[:, task.places + 1]
        >>> bool((options.gather(1, asked.right[:, None])[:, 0] == asked.ids[:, 1]).all())
        True
    """

    contents: int = 20
    options: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.options <= min(LETTERS, self.contents):
            raise RegardError(
                f"options is {self.options}; it goes from 2 to {min(LETTERS, self.contents)} among "
                f"{self.contents} contents."
            )

    @property
    def vocabulary(self) -> int:
        return 3 + LETTERS + self.contents

    @property
    def places(self) -> Tensor:
        """Positions of the labels, int64 [options]; each option stands after its label."""
        import torch

        return 2 + 2 * torch.arange(self.options)

    def batch(self, count: int, kind: str, generator: torch.Generator) -> SymbolicQuestions:
        """Return `count` questions.

        Args:
            kind: `ordered` for labels A, B, C .., `random` for letters drawn.

        Raises:
            RegardError: for another kind.
        """
        import torch

        if kind not in KINDS:
            raise RegardError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")

        def drawn(of: int) -> Tensor:
            return torch.rand(count, of, generator=generator).argsort(1)[:, : self.options]

        letters = torch.arange(self.options).expand(count, -1) if kind == "ordered" else drawn(LETTERS)
        labels, options = 3 + letters, 3 + LETTERS + drawn(self.contents)
        right = torch.randint(self.options, (count,), generator=generator)
        asked = options.gather(1, right[:, None])
        listed = torch.stack([labels, options], 2).flatten(1)
        ends = torch.tensor([FIRST, SECOND]).expand(count, -1)
        ids = torch.cat([torch.full((count, 1), BEGIN), asked, listed, ends], 1)
        return SymbolicQuestions(ids, labels, right)
