"""Which keys of a grid's axis each query sees in neighbourhood attention, and runs of equal tiles of queries.

Along an axis of L positions, with kernel k and stride s, position p sees

    keys start .. start + k - 1,  start = clamp(lead - k div 2, 0, L - k),
                                  lead = min((p div s) s + (s div 2), L - 1)
    keys start .. p,              start = max(lead - (k - 1), 0),                       causal
                                  lead = min((p div s) s + s - 1, L - 1)

That is the border rule `clamp`: windows are moved inside, and the first of the last windows back. Otherwise
windows stay where they are, start = lead - k div 2 with no bound on lead, and of what is outside

    cut     nothing is seen
    zero    keys and values of zeros are seen, but where the last window's queries end before their stride
            does, past whose end nothing is

With kernel b + 2 h and stride b, windows of `cut` and `zero` are blocks of b with a halo of h; with kernel b,
blocks alone; in causal order, kernel b + h is a block and the h keys before it.

With dilation d, position i is the i div d-th of group i mod d, and sees keys of its group alone, by the same
rule inside the group; groups may differ in length by one. The neighbourhood on a grid is the product of
those of its axes.

Source: Hassani et al., 2024, arXiv 2403.04690, as natten 0.21 has it; for the other borders Vaswani et al.,
2021, arXiv 2103.12731. Status: agrees with the official code, but for kernels longer than a group, which here
see the whole of it: callers refuse them where they must.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MOST_TILE = 2**18
COPY_NS, PASSES_NS, GROUP_NS = 0.2, 0.6, 5e4


@dataclass(frozen=True)
class Axis:
    """The rule of one axis.

    Attributes:
        length: positions.
        kernel: how many keys a query sees, from 1.
        stride: how many queries in a row share a window.
        dilation: distance between the keys that a query sees.
        causal: whether a query sees no key after it.
        border: what becomes of windows that reach outside, `clamp`, `cut` or `zero`.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    border: str = "clamp"

    @property
    def before(self) -> int:
        """How many keys a window has before the first query of its stride, where no border moves it."""
        return self.kernel - self.stride if self.causal else self.kernel // 2 - self.stride // 2

    def groups(self) -> tuple[Group, ...]:
        """Return the groups of positions that see each other, those of one length together."""
        whole, more = divmod(self.length, self.dilation)
        found = [Group(0, more, whole + 1)] if more else []
        return tuple(found + ([Group(more, self.dilation - more, whole)] if whole else []))

    def visible(self) -> Tensor:
        """Return which keys each query sees, bool [length, length]."""
        seen = torch.zeros(self.length, self.length, dtype=torch.bool)
        for group in self.groups():
            start, stop = windows(group.length, self.kernel, self.stride, self.causal, self.border)
            at = torch.arange(group.length)
            inside = (at >= start[:, None]) & (at < stop[:, None])
            for first in range(group.first, group.first + group.count):
                seen[first :: self.dilation, first :: self.dilation] = inside
        return seen


@dataclass(frozen=True)
class Group:
    """Groups of `length` positions with distance d: `count` of them, which begin at `first` and after."""

    first: int
    count: int
    length: int


@dataclass(frozen=True, eq=False)
class Run:
    """Tiles of queries in a row that meet their keys in the same way.

    Attributes:
        first, size, count: tile i has the queries from `first` + i `size` on, `size` of them.
        start, width: and the keys from `start` + i `size` on, `width` of them.
        visible: bool [size, width].
    """

    first: int
    size: int
    count: int
    start: int
    width: int
    visible: Tensor


def windows(
    length: int, kernel: int, stride: int, causal: bool, border: str = "clamp"
) -> tuple[Tensor, Tensor]:
    """Return the first key and one past the last of each position of a group, int64 [length] each.

    With border `zero` they may be outside the group.

    Example:
        >>> windows(5, 3, 1, False)[0].tolist(), windows(5, 3, 1, True)[0].tolist()
        ([0, 0, 1, 2, 2], [0, 0, 0, 1, 2])
        >>> [x.tolist() for x in windows(4, 4, 2, False, "zero")], windows(4, 4, 2, False, "cut")[0].tolist()
        ([[-1, -1, 1, 1], [3, 3, 5, 5]], [0, 0, 1, 1])
    """
    at = torch.arange(length)
    if border == "clamp":
        return _inside(at, length, min(kernel, length), stride, causal)
    start = at // stride * stride - Axis(length, kernel, stride, causal=causal).before
    stop = at + 1 if causal else start + kernel
    if border == "cut":
        start = start.clamp(min=0)
    if border == "cut" or length % stride:
        stop = stop.clamp(max=length)
    return start, stop


def _inside(at: Tensor, length: int, kernel: int, stride: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The windows of `clamp`."""
    if causal:
        lead = (at // stride * stride + stride - 1).clamp(max=length - 1)
        return (lead - kernel + 1).clamp(min=0), at + 1
    lead = (at // stride * stride + stride // 2).clamp(max=length - 1)
    start = (lead - kernel // 2).clamp(0, length - kernel)
    return start, start + kernel


@lru_cache(maxsize=512)
def runs(
    length: int, kernel: int, stride: int, causal: bool, size: int, border: str = "clamp"
) -> tuple[Run, ...]:
    """Return the tiles of a group of positions, `size` queries each, the last may be shorter.

    Example:
        >>> [(run.first, run.count, run.start, run.width) for run in runs(16, 3, 1, False, 4)]
        [(0, 1, 0, 5), (4, 2, 3, 6), (12, 1, 11, 5)]
    """
    start, stop = windows(length, kernel, stride, causal, border)
    whole = length // size * size
    found = _runs(start[:whole].view(-1, size), stop[:whole].view(-1, size), 0) if whole else []
    if whole < length:
        found += _runs(start[None, whole:], stop[None, whole:], whole)
    return tuple(found)


def _runs(start: Tensor, stop: Tensor, first: int) -> list[Run]:
    """The runs of whole tiles, of which the first begins at query `first`; [tiles, size] each."""
    low, high = start.amin(1), stop.amax(1)
    inside = torch.cat([start - low[:, None], stop - low[:, None]], 1)
    like = [False, *(inside[1:] == inside[:-1]).all(1).tolist()]
    steps = [0, *(low[1:] - low[:-1]).tolist()]
    size = start.shape[1]
    begins = [tile for tile in range(len(like)) if not like[tile] or steps[tile] != size]
    found = []
    for begin, end in zip(begins, [*begins[1:], len(like)], strict=True):
        at = torch.arange(int(high[begin] - low[begin]))
        visible = (at >= inside[begin, :size, None]) & (at < inside[begin, size:, None])
        found.append(Run(first + begin * size, size, end - begin, int(low[begin]), len(at), visible))
    return found


@lru_cache(maxsize=512)
def tile_of(
    axes: tuple[Axis, ...], lengths: tuple[int, ...], heads: int, group: int, width: int
) -> tuple[int, ...]:
    """Return how many queries along each axis make a tile, by what the tiles will cost.

    Args:
        axes: rules; `lengths`: positions of a group along each.
        heads: how often the tiles occur, over batch, groups of dilation and key heads.
        group: query heads to a key head.
        width: numbers in a key and a value together.
    """
    sizes = [_sizes(axis, length) for axis, length in zip(axes, lengths, strict=True)]
    return min(itertools.product(*sizes), key=lambda tile: _cost(axes, lengths, tile, heads, group, width))


def _sizes(axis: Axis, length: int) -> list[int]:
    powers = {axis.stride * 2**i for i in range(9)}
    return sorted({size for size in powers if size < length} | ({length} if length <= 256 else set()))


def _cost(
    axes: tuple[Axis, ...],
    lengths: tuple[int, ...],
    tile: tuple[int, ...],
    heads: int,
    group: int,
    width: int,
) -> float:
    """Nanoseconds, roughly, on one core: products, passes over the scores, copies of the keys, and calls."""
    pairs = keys = calls = 1.0
    most = float(group)
    for axis, length, size in zip(axes, lengths, tile, strict=True):
        parts = runs(length, axis.kernel, axis.stride, axis.causal, size, axis.border)
        pairs *= sum(run.count * run.size * run.width for run in parts)
        keys *= sum(run.count * run.width for run in parts)
        calls *= len(parts)
        most *= size * max(run.width for run in parts)
    rows = group * math.prod(tile)
    rate = 95 * rows / (rows + 5)
    cost = (
        heads * (group * pairs * (2 * width / rate + PASSES_NS) + keys * width * COPY_NS) + calls * GROUP_NS
    )
    return cost * max(1.0, most / MOST_TILE)
