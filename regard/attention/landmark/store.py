"""What landmark attention keeps of a text that it reads block by block, and how the text is added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kept(NamedTuple):
    """The state of one layer, tensors with the batch first. Rows that have less are filled up with zeros.

    Attributes:
        seen: int64 [B], how many tokens were read.
        marks: [B, Hkv, m, D], what blocks are chosen by.
        keys: [B, Hkv, m, L, D], of closed blocks, the oldest first.
        values: [B, Hkv, m, L, Dv].
        near_keys: [B, Hkv, n, D], of the section that the next token stands in.
        near_values: [B, Hkv, n, Dv].
    """

    seen: Tensor
    marks: Tensor
    keys: Tensor
    values: Tensor
    near_keys: Tensor
    near_values: Tensor

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, block: int, device: str | None) -> Kept:
        """Return what is kept before the first token of keys k [B, Hkv, T, D] and values v."""
        shape, far = k.shape[:2], device or k.device
        return cls(
            torch.zeros(k.shape[0], dtype=torch.int64, device=k.device),
            k.new_zeros(*shape, 0, k.shape[3]),
            k.new_zeros(*shape, 0, block, k.shape[3], device=far),
            v.new_zeros(*shape, 0, block, v.shape[3], device=far),
            k.new_zeros(*shape, 0, k.shape[3]),
            v.new_zeros(*shape, 0, v.shape[3]),
        )

    def even(self) -> bool:
        """Whether all rows have read the same number of tokens."""
        return self.seen.shape[0] < 2 or bool((self.seen == self.seen[0]).all())


@dataclass(frozen=True)
class Sizes:
    """How much is kept: blocks of `block` tokens, `memory` of them or all, and sections of `local` tokens."""

    block: int
    local: int
    memory: int | None

    def blocks(self, seen: int) -> int:
        """Return how many closed blocks are kept after `seen` tokens."""
        whole = seen // self.local * self.local // self.block
        return whole if self.memory is None else min(whole, self.memory)

    def row(self, kept: Kept, row: int) -> Kept:
        """Return what is kept of one row of a batch, without what fills it up."""
        one, seen = slice(row, row + 1), int(kept.seen[row])
        blocks, near = self.blocks(seen), seen % self.local
        ends = (None, blocks, blocks, blocks, near, near)
        return Kept(*(x[one] if n is None else x[one, :, :n] for x, n in zip(kept, ends, strict=True)))


def stacked(rows: list[Kept]) -> Kept:
    """Return the rows as one batch, filled up to the longest."""
    return Kept(*(_stack(list(parts)) for parts in zip(*rows, strict=True)))


def _stack(parts: list[Tensor]) -> Tensor:
    if parts[0].ndim == 1:
        return torch.cat(parts)
    most = max(x.shape[2] for x in parts)
    filled = [F.pad(x, (*[0] * 2 * (x.ndim - 3), 0, most - x.shape[2])) for x in parts]
    return torch.cat(filled)
