"""The tiles of block-sparse attention: queries, listed keys and values, and what may be seen, in pieces.

A *unit* is a batch row and the heads that share a gather: a key head with its group of query heads where the
group reads one list, else one query head. A *piece* is some units times some query blocks; its tiles are

    queries  [Z, G R, D]      Z = units * query blocks, G query heads of R rows each
    keys     [Z, N, D]        N = n * key_block listed keys
    values   [Z, N, Dv]

Keys and values lie side by side, [key block, key_block * (D + Dv)], so that one `index_select` of whole
blocks fetches both, in pieces small enough to stay in the cache that cores share. Room is made once and used
by every piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = {"cpu": 2**21, "cuda": 2**26}

Visible = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Lists:
    """Who reads what.

    Attributes:
        index: int64 [B|1, Hu|1, Q, n], the key blocks of a query block; -1 is none. Hu is the number of units
            to a batch row.
        key_block: keys in a block.
        keys: number of keys.
        size: R, rows in a query block.
        rows: int64 [B|1, H|1, Q, R], -1 for none, or None where query block j is the rows from j R.
        visible: of positions, or bool [B|1, H|1, Q|1, R, N], or None.
        clear: of the n listed blocks, from the first, how many exist and are visible to all rows.
    """

    index: Tensor
    key_block: int
    keys: int
    size: int
    rows: Tensor | None
    visible: Visible | Tensor | None
    clear: int = 0

    @property
    def blocks(self) -> int:
        """Number of query blocks."""
        return self.index.shape[2]

    @property
    def listed(self) -> int:
        """N, keys that a query block lists."""
        return self.index.shape[3] * self.key_block

    def listed_keys(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return the keys of query blocks `start:stop` that are not clear, and which exist, None for all.

        Both are [B|1, Hu|1, Q', N'].
        """
        some = self.index[:, :, start:stop, self.clear :]
        inside = torch.arange(self.key_block, device=some.device)
        keys = (some[..., None] * self.key_block + inside).flatten(3)
        if not self._ragged:
            return keys, None
        exist = (keys >= 0) & (keys < self.keys)
        return torch.where(exist, keys, 0), exist

    @cached_property
    def _ragged(self) -> bool:
        return self.keys % self.key_block != 0 or bool((self.index < 0).any())

    def mask(self, start: int, stop: int, group: int) -> Tensor | None:
        """Return what query blocks `start:stop` see, bool [B|1, Hu|1, Q', G|1, R, N'], or None for all.

        N' is without the keys of the blocks that are clear.

        Args:
            group: G, query heads to a unit.
        """
        if self.visible is None and not self._ragged:
            return None
        keys, exist = self.listed_keys(start, stop)
        found = None
        if isinstance(self.visible, Tensor):
            found = self.visible if self.visible.shape[2] == 1 else self.visible[:, :, start:stop]
        elif self.visible is not None:
            if self.rows is None:
                rows = torch.arange(start * self.size, stop * self.size, device=keys.device)
                rows = rows.view(1, 1, stop - start, self.size)
            else:
                rows = self.rows[:, :, start:stop].clamp_min(0)
            if keys.shape[1] > 1 and group > 1:
                keys = keys.repeat_interleave(group, 1)
            found = self.visible(rows[..., None], keys[..., None, :])
        if found is not None:
            found = grouped_mask(found, group)
        if exist is None:
            return found
        exist = exist[:, :, :, None, None]
        return exist if found is None else found & exist


def grouped_mask(mask: Tensor, group: int) -> Tensor:
    """Return a mask [B|1, H|1, Q', R, N], or of fewer dimensions, as [B|1, Hu|1, Q', G|1, R, N]."""
    mask = mask.view((1,) * (5 - mask.ndim) + tuple(mask.shape))
    if mask.shape[1] == 1 or group == 1:
        return mask[:, :, :, None]
    return mask.unflatten(1, (-1, group)).transpose(2, 3)


@dataclass(frozen=True)
class Piece:
    """Units `first:last` of query blocks `start:stop`; `hidden` is 0 or -inf [U'|1, Q'|1, G|1, R|1, N']."""

    first: int
    last: int
    start: int
    stop: int
    hidden: Tensor | None


class Tiles:
    """Tiles of one call.

    Args:
        q: [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv].
        lists: who reads what.
        scale: factor on the queries.
        units: units to a batch row, Hkv or H.

    Attributes:
        wide: the type of tiles, float64 where `q` is and float32 otherwise.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, units: int) -> None:
        self.lists, self.scale, self.units = lists, scale, units
        self.batch, self.heads, self.length, self.width = q.shape
        self.kv_heads, self.values = k.shape[1], v.shape[3]
        self.group = self.heads // units
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device
        self._room: dict[str, Tensor] = {}
        self._q = self.by_block(q)
        self.key_blocks = -(-k.shape[2] // lists.key_block)
        both = torch.cat([k, v], -1)
        spare = self.key_blocks * lists.key_block - k.shape[2]
        both = F.pad(both, (0, 0, 0, spare)) if spare else both
        self._both = both.view(self.batch * self.kv_heads * self.key_blocks, -1)

    def room(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return memory of a shape, the same for every piece."""
        size = math.prod(shape)
        if name not in self._room or self._room[name].numel() < size:
            self._room[name] = torch.empty(size, dtype=dtype or self.wide, device=self.device)
        return self._room[name][:size].view(shape)

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the call, with what they hide."""
        lists, group = self.lists, self.group
        rows = group * lists.size
        each = rows * lists.listed + (lists.listed + rows) * (self.width + self.values)
        fit = max(1, PIECE.get(self.device.type, PIECE["cuda"]) // each)
        all_units = self.batch * self.units
        said = [x for x in (lists.index, lists.rows, lists.visible) if isinstance(x, Tensor)]
        blocks = _even(lists.blocks, fit // max(x.shape[0] * x.shape[1] for x in said))
        some = _even(all_units, fit // blocks)
        for start in range(0, lists.blocks, blocks):
            stop = min(start + blocks, lists.blocks)
            mask = lists.mask(start, stop, group)
            hidden = None if mask is None else _hidden(mask, self.wide)
            for first in range(0, all_units, some):
                last = min(first + some, all_units)
                part = None if hidden is None else self._of_units(hidden, first, last)
                yield Piece(first, last, start, stop, part)

    def _of_units(self, x: Tensor, first: int, last: int) -> Tensor:
        """Units `first:last` of [B|1, Hu|1, ...], as [U'|1, ...]."""
        if x.shape[0] == x.shape[1] == 1:
            return x[0]
        unit = torch.arange(first, last, device=x.device)
        batch, head = unit // self.units, unit % self.units
        return x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]

    def by_block(self, x: Tensor) -> Tensor:
        """Return [B, H, T, D], or [B, H, Q, R, D], as [U, G, Q, R, D]."""
        lists = self.lists
        if lists.rows is None:
            spare = lists.blocks * lists.size - x.shape[2]
            x = F.pad(x, (0, 0, 0, spare)) if spare else x
        elif x.ndim == 4:
            x = x.reshape(-1, x.shape[3]).index_select(0, self.flat_rows())
        return x.reshape(self.batch * self.units, self.group, lists.blocks, lists.size, -1)

    def flat_rows(self) -> Tensor:
        """Return the rows of all query blocks as rows of [B H T], flat; those that do not exist as row 0."""
        assert self.lists.rows is not None
        first = torch.arange(self.batch * self.heads, device=self.device) * self.length
        return (self.lists.rows.clamp_min(0) + first.view(self.batch, self.heads, 1, 1)).flatten()

    def queries(self, piece: Piece) -> Tensor:
        """Return the queries of a piece, scaled, [Z, G R, D]."""
        return self.rows(piece, self._q, "queries").mul_(self.scale)

    def rows(self, piece: Piece, x: Tensor, name: str) -> Tensor:
        """Return the rows of a piece of [U, G, Q, R, D], as [Z, G R, D], in the room called `name`."""
        some = x[piece.first : piece.last, :, piece.start : piece.stop].transpose(1, 2)
        return self.room(name, *some.shape).copy_(some).view(-1, some.shape[2] * some.shape[3], some.shape[4])

    def write(self, piece: Piece, x: Tensor, into: Tensor) -> None:
        """Write the rows of a piece [Z, G R, D] into [U, G, Q, R, D]."""
        there = into[piece.first : piece.last, :, piece.start : piece.stop].transpose(1, 2)
        there.copy_(x.view(there.shape))

    def blocks_of(self, piece: Piece) -> Tensor:
        """Return the key blocks of a piece, as rows of all units' key blocks, [Z n]; -1 as block 0."""
        unit = torch.arange(piece.first, piece.last, device=self.device)
        index = self._of_units(self.lists.index[:, :, piece.start : piece.stop], piece.first, piece.last)
        first = unit // (self.units // self.kv_heads) * self.key_blocks
        return (index.clamp_min(0) + first[:, None, None]).flatten()

    def listed(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys [Z, N, D] and values [Z, N, Dv] of the blocks of a piece."""
        into = self.room("listed", len(blocks), self._both.shape[1], dtype=self._both.dtype)
        torch.index_select(self._both, 0, blocks, out=into)
        tile = into.view(-1, self.lists.listed, self.width + self.values)
        if tile.dtype != self.wide:
            tile = self.room("wide", *tile.shape).copy_(tile)
        return tile[..., : self.width], tile[..., self.width :]

    def scores(self, piece: Piece, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the scores of a piece [Z, G R, N], -inf where hidden."""
        scores = self.room("scores", *queries.shape[:2], keys.shape[1])
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        if piece.hidden is not None:
            blocks = piece.stop - piece.start
            asked = scores[..., self.lists.clear * self.lists.key_block :]
            asked.unflatten(1, (self.group, self.lists.size)).unflatten(0, (-1, blocks)).add_(piece.hidden)
        return scores


def _even(count: int, most: int) -> int:
    """The size of pieces of at most `most` that cut `count` most evenly."""
    most = min(count, max(1, most))
    return -(-count // -(-count // most))


def _hidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask is True and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
