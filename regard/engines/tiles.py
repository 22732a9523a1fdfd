"""The tiles of a grid for attention to near keys: where their queries and keys are, and how they are copied.

A tile of queries, such as 4 x 8 of a plane, meets the box of keys that any of them sees, 4 + k - 1 by
8 + k - 1. So that no box is copied by itself, keys are laid out in strips: the whole first axis, and of the
others the widths of the boxes. In a strip a box is one run of memory, and boxes of tiles above each other
overlap there. Lists of key blocks (`blocks.py`) serve any pattern; this reads no lists, masks a tile at a
time, and copies a key some 2.5 times in the place of 10: neighbourhoods have it to themselves.

Shapes: B batch rows, g1.. positions of groups of dilation, H key heads, G query heads to each, n2.. tiles
along the axes but the first; [B, g1.., n2.., H] are the dims of the strips. D numbers in a key.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.grids import Axis, Group, Run, runs, tile_of

MOST_SCORES, MOST_STRIPS, KEPT = 2**20, 2**22, 2**21
Box = tuple[slice, ...]


class Room:
    """Memory that is used again, by later calls too: one flat tensor a name.

    Fresh memory costs a CPU a page fault every 4 KB, a sixth of a whole call. What a thread keeps is some
    `KEPT` numbers of a dtype at most; a GPU has an allocator that keeps memory itself.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        on_cpu = like.device.type == "cpu"
        self._kept: dict[str, Tensor] = _rooms_of(like.dtype) if on_cpu else {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of a shape, with whatever was in it."""
        count = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < count:
            self._kept[name] = self.like.new_empty(count)
        return self._kept[name][:count].view(shape)

    def close(self) -> None:
        """Forget what is too large to keep."""
        for name in [name for name, x in self._kept.items() if x.numel() > KEPT]:
            del self._kept[name]


_LOCAL = threading.local()


def _rooms_of(dtype: torch.dtype) -> dict[str, Tensor]:
    rooms: dict[torch.dtype, dict[str, Tensor]] = _LOCAL.__dict__.setdefault("rooms", {})
    return rooms.setdefault(dtype, {})


@dataclass(frozen=True, eq=False)
class Part:
    """Strips of equal groups of dilation, cut in the same way along the axes but the first.

    Attributes:
        axes: rules; `groups`: group of dilation along each.
        outer: runs of the first axis.
        inner: one run of each other axis.
        heads: key heads; `group`: query heads to each.
    """

    axes: tuple[Axis, ...]
    groups: tuple[Group, ...]
    outer: tuple[Run, ...]
    inner: tuple[Run, ...]
    heads: int
    group: int

    def lead(self, batch: int) -> tuple[int, ...]:
        """Return the dims of the strips."""
        return (batch, *(g.count for g in self.groups), *(run.count for run in self.inner), self.heads)

    @property
    def wide(self) -> int:
        """Keys in a slice of a strip."""
        return math.prod(run.width for run in self.inner)

    @property
    def length(self) -> int:
        """Slices in a strip."""
        return self.groups[0].length

    def boxes(self, batch: int, width: int) -> Iterator[Box]:
        """Return which strips are computed at a time; `width` numbers are in a key and a value together."""
        return boxes_of(self.lead(batch), MOST_STRIPS // max(1, self.length * self.wide * width))

    def strips(self, x: Tensor, pieces: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Return x [B, X1.., H, D] as [*lead, L1, W2.., D], a view.

        Args:
            pieces: offset and length of what to take of each width, default all.
        """
        pieces = [(0, run.width) for run in self.inner] if pieces is None else pieces
        starts = [0, *(run.start + at for run, (at, _) in zip(self.inner, pieces, strict=True))]
        steps = [1, *(run.size for run in self.inner)]
        sizes = [self.length, *(size for _, size in pieces)]
        return self._view(x, self.inner, 1, starts, steps, sizes).squeeze(len(self.axes) * 2 + 1)

    def queries(self, x: Tensor, run: Run) -> Tensor:
        """Return x [B, X1.., H G, D] as [*lead, n1, G, a1.., D], a view."""
        along = (run, *self.inner)
        view = self._view(
            x, along, self.group, [r.first for r in along], [r.size for r in along], [r.size for r in along]
        )  # fmt: skip
        return view

    def _view(
        self, x: Tensor, along: Sequence[Run], group: int, first: Sequence[int], step: Sequence[int],
        size: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """[B, g1.., n2.., H, n1, group, size1.., D]; without n1 where `along` has the inner runs alone."""
        stride, axes = x.stride(), len(self.axes)
        far = [stride[1 + i] * axis.dilation for i, axis in enumerate(self.axes)]
        tiles = [f * s for f, s in zip(far, step, strict=True)]
        whole = len(along) == axes
        shape = [x.shape[0], *(g.count for g in self.groups), *(run.count for run in self.inner), self.heads]
        strides = [stride[0], *stride[1 : 1 + axes], *tiles[1:], group * stride[-2]]
        shape += [*([along[0].count] if whole else []), group, *size, x.shape[-1]]
        strides += [*(tiles[:1] if whole else []), stride[-2], *far, stride[-1]]
        offset = sum(stride[1 + i] * self.groups[i].first + far[i] * first[i] for i in range(axes))
        return x.as_strided(shape, strides, x.storage_offset() + offset)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Some tiles of some strips, computed together.

    They stand as [outer, inner, ...]: strips and their tiles, or tiles and their strips where those are more.

    Attributes:
        box: which strips; `lead`: how many along each dim, `strips`: of all.
        run: of the first axis; `first`, `count`: which of its tiles.
        views: what `queries` made for other tiles of the run.
    """

    part: Part
    box: Box
    run: Run
    first: int
    count: int
    views: dict[int, Tensor]

    @property
    def lead(self) -> list[int]:
        return [s.stop - s.start for s in self.box]

    @property
    def strips(self) -> int:
        return math.prod(self.lead)

    @property
    def by_strip(self) -> bool:
        """Whether strips are the outer dim."""
        return self.strips <= self.count

    @property
    def dims(self) -> list[int]:
        """The dims that `queries` begins with."""
        return [*self.lead, self.count] if self.by_strip else [self.count, *self.lead]

    @property
    def outer(self) -> int:
        return min(self.strips, self.count)

    @property
    def rows(self) -> int:
        """Queries in a tile, of all heads that share a key head."""
        return self.part.group * self.run.size * math.prod(run.size for run in self.part.inner)

    @property
    def keys(self) -> int:
        """Keys in a box."""
        return self.run.width * self.part.wide

    def shape(self, *last: int) -> tuple[int, ...]:
        """[outer, inner, *last]."""
        return (self.outer, max(self.strips, self.count), *last)

    def queries(self, x: Tensor) -> Tensor:
        """Return x [B, X1.., H G, D] as [*dims, G, a1.., D], a view."""
        if id(x) not in self.views:
            self.views[id(x)] = self.part.queries(x, self.run)[self.box]
        axis = len(self.box)
        view = self.views[id(x)].narrow(axis, self.first, self.count)
        return view if self.by_strip else view.movedim(axis, 0)

    def copied(self, x: Tensor, room: Room, name: str) -> Tensor:
        """Return the rows of x [B, X1.., H G, D], [outer, inner, rows, D]."""
        out = room.take(name, *self.shape(self.rows, x.shape[-1]))
        view = self.queries(x)
        out.view(view.shape).copy_(view)
        return out

    def write(self, tiles: Tensor, x: Tensor) -> None:
        """Write [outer, inner, rows, D] into their places of x [B, X1.., H G, D]."""
        view = self.queries(x)
        view.copy_(tiles.view(view.shape))

    def windows(self, strips: Tensor) -> list[Tensor]:
        """Return the boxes of strips [S, L1, wide, D]: for each of the outer dim [inner, keys, D], views."""
        row = strips.shape[2] * strips.shape[3]
        whole, step, start = strips.stride(0), self.run.size * row, self._start(row)
        inner, between = (step, whole) if self.by_strip else (whole, step)
        shape = (max(self.strips, self.count), self.keys, strips.shape[3])
        at = strips.storage_offset() + start
        return [
            strips.as_strided(shape, (inner, strips.shape[3], 1), at + i * between) for i in range(self.outer)
        ]

    def add(self, boxes: Tensor, strips: Tensor) -> None:
        """Add [outer, inner, keys, D] to the boxes of strips [S, L1, wide, D]."""
        row, width = strips.shape[2] * strips.shape[3], self.run.width
        whole, step, start = strips.stride(0), self.run.size * row, self._start(row)
        found = boxes.view(*self.shape(width * row))
        if not self.by_strip:
            for i in range(self.count):
                strips.as_strided((self.strips, width * row), (whole, 1), start + i * step).add_(found[i])
            return
        for at, size in pieces_of(self.run, self.count):
            target = strips.as_strided(
                (self.strips, self.count, size * row), (whole, step, 1), start + at * row
            )
            target.add_(found[..., at * row : (at + size) * row])

    def _start(self, row: int) -> int:
        return (self.run.start + self.first * self.run.size) * row


def pieces_of(run: Run, count: int) -> list[tuple[int, int]]:
    """Return offset and length of parts of a box, so that none overlaps that of another of `count` tiles."""
    step = run.width if count == 1 else run.size
    return [(at, min(step, run.width - at)) for at in range(0, run.width, step)]


def boxes_of(dims: Sequence[int], most: int) -> Iterator[Box]:
    """Cut a box of `dims` into boxes of at most `most` items, or of one.

    Example:
        >>> [tuple((s.start, s.stop) for s in box) for box in boxes_of((2, 5), 3)]
        [((0, 1), (0, 3)), ((0, 1), (3, 5)), ((1, 2), (0, 3)), ((1, 2), (3, 5))]
    """
    if not dims:
        yield ()
        return
    step = max(1, most // max(1, math.prod(dims[1:])))
    for start in range(0, dims[0], step):
        for rest in boxes_of(dims[1:], most):
            yield (slice(start, min(start + step, dims[0])), *rest)


def parts_of(axes: tuple[Axis, ...], batch: int, heads: int, group: int, width: int) -> Iterator[Part]:
    """Return the parts that make up a grid.

    Args:
        width: numbers in a key and a value together.
    """
    for groups in itertools.product(*(axis.groups() for axis in axes)):
        lengths = tuple(g.length for g in groups)
        times = batch * heads * math.prod(g.count for g in groups)
        size = tile_of(axes, lengths, times, group, width)
        outer, *others = (
            runs(n, axis.kernel, axis.stride, axis.causal, s, axis.border)
            for axis, n, s in zip(axes, lengths, size, strict=True)
        )
        for inner in itertools.product(*others):
            yield Part(axes, groups, outer, inner, heads, group)


def tiles_of(part: Part, box: Box) -> Iterator[Tiles]:
    """Return the tiles of some strips, as many at a time as memory that is near holds."""
    strips = math.prod(s.stop - s.start for s in box)
    for run in part.outer:
        views: dict[int, Tensor] = {}
        tile = part.group * run.size * math.prod(one.size for one in part.inner) * run.width * part.wide
        most = max(1, MOST_SCORES // max(1, strips * tile))
        for first in range(0, run.count, most):
            yield Tiles(part, box, run, first, min(most, run.count - first), views)


def visible_in(part: Part, run: Run) -> Tensor:
    """Return which keys of its box each query of a tile sees, bool [a1 a2.., keys]."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for one in (run, *part.inner):
        seen = (seen[:, None, :, None] & one.visible[None, :, None, :]).flatten(2).flatten(0, 1)
    return seen


def places_in(part: Part, run: Run) -> Tensor:
    """Return where in a bias table [2 k1 - 1, ..] each query and key of a box stand, int64 [a1 a2.., keys].

    A key that no query sees may be further away than the table reaches; it gets the place of the nearest.
    """
    place = torch.zeros(1, 1, dtype=torch.int64)
    for axis, one in zip(part.axes, (run, *part.inner), strict=True):
        apart = one.start - one.first + torch.arange(one.width) - torch.arange(one.size)[:, None]
        apart = (apart + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        place = (place * (2 * axis.kernel - 1))[:, None, :, None] + apart[None, :, None, :]
        place = place.flatten(2).flatten(0, 1)
    return place
