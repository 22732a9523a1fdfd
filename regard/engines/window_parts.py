"""Where blocks and their windows are in a grid, and what relative position adds: the parts of `windows.py`.

A part is blocks that meet their windows in the same way: all of them, or, where borders cut windows, some.
Shapes: N = batch rows x blocks x heads; W keys in a window, A queries in a block, D numbers in a key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.engines.grids import Axis, Run, runs
from regard.engines.tiles import Room, pieces_of
from regard.errors import RegardError

LN2 = math.log(2)
MOST_SCORES, MOST_ROWS = 2**19, 2**22
Tables = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """What `attend_windows` was asked.

    Raises:
        RegardError: where windows would move inside at a border, keys be apart, or queries miss their block.
    """

    axes: tuple[Axis, ...]
    scale: float
    every: int
    reach: int

    def __post_init__(self) -> None:
        for axis in self.axes:
            if axis.border == "clamp" or axis.dilation != 1:
                raise RegardError(f"{axis} is not a rule of blocks: its border must be cut or zero.")
            if axis.length > axis.stride and axis.stride % self.every:
                raise RegardError(f"every is {self.every}; it must divide the stride, {axis.stride}.")

    def parts(self) -> Iterator[tuple[Run, ...]]:
        """Blocks that meet their windows in the same way."""
        return itertools.product(
            *(runs(a.length, a.kernel, a.stride, a.causal, a.stride, a.border) for a in self.axes)
        )

    def rim(self) -> tuple[tuple[int, int], ...]:
        """How many keys of zeros are before and after each axis."""
        found = []
        for axis in self.axes:
            parts = runs(axis.length, axis.kernel, axis.stride, axis.causal, axis.stride, axis.border)
            stop = max(run.start + (run.count - 1) * run.size + run.width for run in parts)
            found.append((max(0, -parts[0].start), max(0, stop - axis.length)))
        return tuple(found)


class Part:
    """Blocks of some batch rows, and where they and their windows are in grids [B, X1.., H, D]."""

    def __init__(self, given: Call, part: tuple[Run, ...], rim: Any, items: slice, heads: int) -> None:
        self.given, self.part, self.items, self.heads = given, part, items, heads
        every = given.every
        self.first = [run.first // every for run in part]
        self.sizes = [-(-run.size // every) for run in part]
        self.starts = [run.start + before for run, (before, _) in zip(part, rim, strict=True)]
        self.widths = [run.width for run in part]
        self.a, self.w = math.prod(self.sizes), math.prod(self.widths)
        self.n = (items.stop - items.start) * math.prod(run.count for run in part) * heads

    def queries(self, x: Tensor) -> Tensor:
        """x [B, Y1.., H, D] as [B, n1.., H, D, a1..], a view."""
        steps = [run.size // self.given.every for run in self.part]
        return self._view(x, self.first, steps, self.sizes).movedim(-1, len(self.part) + 2)

    def windows(self, x: Tensor, pieces: Any = None) -> Tensor:
        """x [B, X1.., H, D], with its rim, as [B, n1.., H, w1.., D], a view, or pieces (at, size)."""
        pieces = [(0, width) for width in self.widths] if pieces is None else pieces
        first = [start + at for start, (at, _) in zip(self.starts, pieces, strict=True)]
        return self._view(x, first, [run.size for run in self.part], [size for _, size in pieces])

    def _view(self, x: Tensor, first: list[int], steps: list[int], sizes: list[int]) -> Tensor:
        x = x if self.items.stop - self.items.start == x.shape[0] else x[self.items]
        far, counts = x.stride()[1:-2], [run.count for run in self.part]
        offset = sum(f * at for f, at in zip(far, first, strict=True))
        shape = (x.shape[0], *counts, self.heads, *sizes, x.shape[-1])
        tiles = (f * step for f, step in zip(far, steps, strict=True))
        strides = (x.stride(0), *tiles, x.stride(-2), *far, x.stride(-1))
        return x.as_strided(shape, strides, x.storage_offset() + offset)

    def rows(self, x: Tensor, room: Room, name: str) -> Tensor:
        """The queries of x as [N, A, D], copied."""
        view = self.queries(x).movedim(len(self.part) + 2, -1)
        return room.take(name, *view.shape).copy_(view).view(self.n, self.a, -1)

    def columns(self, x: Tensor, room: Room, name: str) -> Tensor:
        """The queries of x as [N, D, A], copied."""
        view = self.queries(x)
        return room.take(name, *view.shape).copy_(view).view(self.n, -1, self.a)

    def keys(self, x: Tensor, room: Room, name: str) -> Tensor:
        """The windows of x as [N, W, D], copied."""
        view = self.windows(x)
        return room.take(name, *view.shape).copy_(view).view(self.n, self.w, -1)

    def fold(self, windows: Tensor, x: Tensor) -> None:
        """Add [N, W, D] to their places in x, with its rim, in pieces that do not overlap."""
        whole = windows.view(self.windows(x).shape)
        for pieces in itertools.product(*(pieces_of(run, run.count) for run in self.part)):
            found: Any = (..., *(slice(at, at + size) for at, size in pieces), slice(None))
            self.windows(x, pieces).add_(whole[found])

    def met(self, axis: int) -> slice:
        """Which rows of the table of an axis these blocks meet."""
        rule, run, most = self.given.axes[axis], self.part[axis], self.given.reach * (self.sizes[axis] - 1)
        first = rule.kernel - 1 + run.start - run.first + rule.before - most
        return slice(first, first + run.width + most)

    def hidden(self, like: Tensor) -> Tensor | None:
        """What causal order adds, [W, A], or None where all is seen."""
        if not any(axis.causal for axis in self.given.axes):
            return None
        seen = torch.ones(1, 1, dtype=torch.bool)
        for run in self.part:
            here = run.visible[:: self.given.every].mT
            seen = (seen[:, None, :, None] & here[None, :, None, :]).flatten(2).flatten(0, 1)
        if bool(seen.all()):
            return None
        return like.new_zeros(seen.shape).masked_fill_(~seen.to(like.device), -torch.inf)


class Terms:
    """What is added to scores by relative position, one term [N, w, A] an axis, in powers of two.

    Logits of a query by all rows of the tables that its part meets are one product, [N, m, A]; which of them
    each query and key want is read from a list of places.
    """

    def __init__(self, part: Part, tables: Tables, rows: Tensor, room: Room) -> None:
        self.part, self.room, self.rows = part, room, rows
        self.tables = torch.cat([table[part.met(axis)] for axis, table in enumerate(tables)])
        self.places = places_of(tuple(part.widths), tuple(part.sizes), part.given.reach).to(rows.device)
        logits = room.take("logits", part.n, len(self.tables), part.a)
        torch.bmm((self.tables / LN2).expand(part.n, -1, -1), rows.mT, out=logits)
        found = room.take("terms", part.n, len(self.places))
        torch.index_select(logits.flatten(1), 1, self.places, out=found)
        self.each = self._by_axis(found)

    def _by_axis(self, x: Tensor) -> list[Tensor]:
        widths, a = self.part.widths, self.part.a
        parts = x.split([width * a for width in widths], 1)
        return [part.unflatten(1, (width, a)) for part, width in zip(parts, widths, strict=True)]

    def add_to(self, scores: Tensor, chosen: slice) -> None:
        """Write the sum of the terms into scores [n, W, A]."""
        scores = scores.view(len(scores), *self.part.widths, self.part.a)
        terms = []
        for axis, term in enumerate(self.each):
            shape = [1] * len(self.each)
            shape[axis] = -1
            terms.append(term[chosen].unflatten(1, shape))
        if len(terms) == 2:
            torch.add(*terms, out=scores)
            return
        scores.copy_(terms[0])
        for term in terms[1:]:
            scores.add_(term)

    def gradients(self) -> None:
        """Make room for those of the terms."""
        self.flat = self.room.take("d terms", self.part.n, len(self.places))
        self.found = self._by_axis(self.flat)

    def sum(self, scores: Tensor, chosen: slice) -> None:
        """Keep what gradients of scores [n, W, A] mean for the terms."""
        scores = scores.view(len(scores), *self.part.widths, self.part.a)
        axes = range(1, 1 + len(self.found))
        for axis, found in zip(axes, self.found, strict=True):
            over = [other for other in axes if other != axis]
            if over:
                torch.sum(scores, over, out=found[chosen])
            else:
                found[chosen] = scores

    def into(self, d_rows: Tensor, d_tables: list[Tensor]) -> None:
        """Add the gradients of the rows [N, A, D] and of the tables."""
        part = self.part
        logits = self.room.take("logits", part.n, len(self.tables), part.a).zero_()
        logits.view(part.n, -1).scatter_(1, self.places.expand(part.n, -1), self.flat)
        d_rows.baddbmm_(logits.mT, self.tables.expand(part.n, -1, -1))
        met = [part.met(axis) for axis in range(len(d_tables))]
        found = torch.bmm(logits, self.rows).sum(0).split([rows.stop - rows.start for rows in met])
        for table, rows, gradient in zip(d_tables, met, found, strict=True):
            table[rows] += gradient


@lru_cache(maxsize=64)
def places_of(widths: tuple[int, ...], sizes: tuple[int, ...], reach: int) -> Tensor:
    """Return where in logits [m, A] the terms [w, A] of each axis stand, int64, all in a row.

    Of key u and query i along an axis it is row u + reach (a - 1 - i), after the rows of the axes before.

    Example:
        >>> places_of((3,), (2,), 1).view(3, 2).tolist()
        [[2, 1], [4, 3], [6, 5]]
    """
    a, first, found = math.prod(sizes), 0, []
    queries = torch.arange(a).view(sizes)
    for axis, (width, size) in enumerate(zip(widths, sizes, strict=True)):
        shape = [1] * len(sizes)
        shape[axis] = size
        later = reach * (size - 1 - torch.arange(size).view(shape)).expand(sizes)
        rows = first + torch.arange(width).view(-1, *[1] * len(sizes)) + later
        found.append((rows * a + queries).flatten())
        first += width + reach * (size - 1)
    return torch.cat(found)


def parts_of(q: Tensor, given: Call) -> Iterator[Part]:
    """The parts of a call, some batch rows at a time."""
    rim, heads = given.rim(), q.shape[-2]
    most = MOST_ROWS if q.device.type == "cpu" else 2**28
    for part in given.parts():
        whole = Part(given, part, rim, slice(0, q.shape[0]), heads)
        step = max(1, most * q.shape[0] // max(1, whole.n * whole.a * whole.w))
        for first in range(0, q.shape[0], step):
            yield Part(given, part, rim, slice(first, min(first + step, q.shape[0])), heads)


def chunks_of(part: Part, device: torch.device) -> Iterator[slice]:
    most = MOST_SCORES if device.type == "cpu" else 2**26
    step = max(1, most // max(1, part.a * part.w))
    for first in range(0, part.n, step):
        yield slice(first, min(first + step, part.n))


def rimmed(x: Tensor, rim: Any, room: Room, name: str) -> Tensor:
    """x [B, X1.., H, D] with zeros around it where windows reach outside."""
    if not any(map(any, rim)):
        return x
    out = room.take(f"rimmed {name}", *rimmed_shape(x, rim)).zero_().movedim(1, -2)
    unrimmed(out, rim, x.shape[1:-2]).copy_(x)
    return out


def rimmed_shape(x: Tensor, rim: Any) -> tuple[int, ...]:
    """[B, H, X1.., D] with the rim: heads before the grid, so that rows of a window are near each other."""
    grid = [before + n + after for n, (before, after) in zip(x.shape[1:-2], rim, strict=True)]
    return (x.shape[0], x.shape[-2], *grid, x.shape[-1])


def unrimmed(x: Tensor, rim: Any, grid: Any) -> Tensor:
    for axis, ((before, _), length) in enumerate(zip(rim, grid, strict=True)):
        x = x.narrow(axis + 1, before, length)
    return x
