"""A grid of bins that the attention of a growing text is added to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Grid:
    """Attention of some heads to some sequences, by bins of `width` rows and keys.

    Args:
        sequences: how many sequences.
        heads: how many heads.
        most: at most so many bins a side.
        device: where it is kept.
    """

    def __init__(self, sequences: int, heads: int, most: int, device: torch.device) -> None:
        self.most, self.width = most, 1
        self.total = torch.zeros(sequences, heads, 0, 0, device=device)
        self.largest: Tensor | None = None
        self.rows, self.keys = [0] * sequences, [0] * sequences
        self.first: list[int | None] = [None] * sequences

    def __len__(self) -> int:
        return len(self.total)

    def add(self, sequence: int, part: Tensor, row: int, key: int) -> None:
        """Add the weights [heads, R, K] of the rows and keys that begin at positions `row` and `key`."""
        rows, keys = row + part.shape[1], key + part.shape[2]
        self.rows[sequence] = max(self.rows[sequence], rows)
        if self.first[sequence] is None:
            self.first[sequence] = row
        self.keys[sequence] = max(self.keys[sequence], keys)
        while max(rows, keys) > self.width * self.most:
            self._widen()
        self._reach(-(-rows // self.width), -(-keys // self.width))
        first_row, first_key = row // self.width, key // self.width
        total, largest = _pooled(part, self.width, row, key)
        place = (
            sequence,
            slice(None),
            slice(first_row, first_row + total.shape[1]),
            slice(first_key, first_key + total.shape[2]),
        )
        self.total[place] += total
        if self.largest is not None:
            self.largest[place] = torch.maximum(self.largest[place], largest)

    def cut(self, sequence: int, row: int) -> None:
        """Forget the rows from `row` on, as a cropped cache does; a bin that had others too is NaN."""
        first = row // self.width
        for kept in (self.total, self.largest):
            if kept is None:
                continue
            kept[sequence, :, first:] = 0
            if row % self.width:
                kept[sequence, :, first] = torch.nan
        self.rows[sequence] = row

    def follow(self, order: Tensor) -> bool:
        """Let sequence i continue what was sequence `order[i]`; False where that one was not kept."""
        source = order[: len(self)].tolist()
        if any(i >= len(self) for i in source):
            return False
        index = torch.tensor(source, device=self.total.device)
        self.total = self.total.index_select(0, index)
        self.largest = None if self.largest is None else self.largest.index_select(0, index)
        self.rows, self.keys = [self.rows[i] for i in source], [self.keys[i] for i in source]
        self.first = [self.first[i] for i in source]
        return True

    def pattern(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Return the mean over rows of the mass on each bin, and the largest weight in it, on the CPU.

        Rows before the first that was added count as unseen; a bin of nothing else is NaN.
        """
        rows, keys = self.rows[sequence], self.keys[sequence]
        bins = (slice(None), slice(-(-rows // self.width)), slice(-(-keys // self.width)))
        total = self.total[sequence][bins].cpu().clone()
        counts = torch.full((total.shape[1],), float(self.width))
        if len(counts):
            counts[-1] = rows - (len(counts) - 1) * self.width
        unseen = torch.arange(len(counts)) * -self.width + (self.first[sequence] or 0)
        counts -= torch.minimum(unseen.clamp(min=0).float(), counts)
        largest = total if self.largest is None else self.largest[sequence][bins].cpu()
        mean = total / counts[:, None]
        return mean, mean.clone() if self.largest is None else largest.masked_fill(mean.isnan(), torch.nan)

    def _widen(self) -> None:
        if self.largest is None:
            self.largest = self.total
        self.total = _pooled(self.total, 2)[0]
        self.largest = _pooled(self.largest, 2)[1]
        self.width *= 2

    def _reach(self, rows: int, keys: int) -> None:
        """Make room for so many bins; at least half as many again where it grows, to copy seldom."""
        old = self.total.shape[2:]
        if rows <= old[0] and keys <= old[1]:
            return
        grown = [
            size if need <= size else min(self.most, max(need, size * 3 // 2))
            for need, size in zip((rows, keys), old, strict=True)
        ]
        more = (0, grown[1] - old[1], 0, grown[0] - old[0])
        self.total = F.pad(self.total, more)
        self.largest = None if self.largest is None else F.pad(self.largest, more)


def _pooled(x: Tensor, width: int, row: int = 0, key: int = 0) -> tuple[Tensor, Tensor]:
    """Return the sums and the largest of [..., R, K], whose first row and key stand at `row` and `key`.

    Zeros fill the bins of `width` that it begins and ends in. Keys go first, to keep what is padded small.
    """
    if width == 1:
        return x, x
    bins = _bins(x, key, width)
    total, largest = (_bins(part.mT, row, width) for part in (bins.sum(-1), bins.amax(-1)))
    return total.sum(-1).mT, largest.amax(-1).mT


def _bins(x: Tensor, first: int, width: int) -> Tensor:
    """Return [..., N] in bins, [..., bins, width]."""
    return F.pad(x, (first % width, -(first + x.shape[-1]) % width)).unflatten(-1, (-1, width))
