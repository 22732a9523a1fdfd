"""Lookups of which half must come back with nothing: what a head does where it has nothing to add.

A sequence holds tokens in random order, each with a name and a value; the token named 0 has the value zero,
like a delimiter. Every position asks for one of the others by name, and says whether it wants an answer. The
target is that token's value, or zero where none is wanted. Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regard.errors import RegardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Lookup:
    """The task's sizes.

    Attributes:
        length: tokens in a sequence, from 2.
        width: of a value.
        idle: share of the positions that want nothing.
    """

    length: int = 16
    width: int = 16
    idle: float = 0.5

    def __post_init__(self) -> None:
        if self.length < 2 or self.width < 1 or not 0 <= self.idle <= 1:
            raise RegardError(f"{self} cannot be asked: length from 2, width from 1, idle from 0 to 1.")

    @property
    def dim(self) -> int:
        """Width of an input: name, name asked for, whether it wants an answer, and value."""
        return 2 * self.length + 1 + self.width

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs [B, T, dim], targets [B, T, width], and who wants an answer, bool [B, T]."""
        import torch
        from torch.nn.functional import one_hot

        length, shape = self.length, (count, self.length)
        names = torch.stack([torch.randperm(length, generator=generator) for _ in range(count)])
        asked = torch.randint(1, length, shape, generator=generator)
        wants = torch.rand(shape, generator=generator) >= self.idle
        values = torch.randn(*shape, self.width, generator=generator) * (names > 0)[..., None]
        where = names.argsort(1).gather(1, asked)[..., None].expand(-1, -1, self.width)
        flags = wants[..., None].float()
        inputs = torch.cat([one_hot(names, length), one_hot(asked, length), flags, values], -1)
        return inputs, values.gather(1, where) * flags, wants
