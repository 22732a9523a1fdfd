"""Softmax attention on a grid to the keys near each query, forward and backward, in any number of axes.

    s = q k^T scale + bias + mask;  p = exp(s - m);  l = sum p;  out = p v / l;  lse = log l + m

over the boxes of tiles (`tiles.py`), of which a query sees k keys an axis (`grids.py`). Scores are kept in
powers of two, since exp2 is the faster, and m is 0 where norms say that no sum can overflow. Backward
computes p again from lse. Results lie in memory with heads before the grid.

Operations O(T k^r) for r axes, memory O(T).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.grids import Axis, Run
from regard.engines.tiles import Part, Room, Tiles, parts_of, pieces_of, places_in, tiles_of, visible_in
from regard.errors import RegardError

LN2 = math.log(2)
BOUND = {torch.float32: 100.0, torch.float64: 900.0}


def attend_neighborhoods(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return out [B, X1.., H, Dv] in the dtype of v and lse [B, X1.., H], float32 or from float64 float64.

    Args:
        q: [B, X1.., H, D], of any strides.
        k, v: [B, X1.., Hkv, D] and [B, X1.., Hkv, Dv]; H is a multiple of Hkv.
        axes: the rule of each; their border is `clamp` or `cut`.
        scale: factor on q k^T.
        bias: table [H, 2 k1 - 1, ..], added by how far the key stands from the query, in steps of dilation.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 30, 2, 8)
        >>> out, lse = attend_neighborhoods(q, k, v, (Axis(20, 5), Axis(30, 5)), scale=0.3)
        >>> tuple(out.shape), tuple(lse.shape)
        ((1, 20, 30, 2, 8), (1, 20, 30, 2))
    """
    if any(axis.border == "zero" for axis in axes):
        raise RegardError("border is 'zero'; windows that move with their query must be clamped or cut.")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        found: tuple[Tensor, Tensor] = _AttendNeighborhoods.apply(q, k, v, bias, axes, scale)
        return found
    with torch.no_grad():
        out, lse = _forward(q, k, v, bias, axes, scale)
    return out, lse


class _AttendNeighborhoods(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Any, scale: float
    ) -> Any:
        out, lse = _forward(q, k, v, bias, axes, scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.axes, ctx.scale = axes, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v, bias, out, lse = ctx.saved_tensors
        with torch.no_grad():
            delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).sub_(d_lse)
            found = _backward(q, k, v, bias, ctx.axes, ctx.scale, lse, d_out, delta)
        return *found, None, None


class _Masks:
    """What is added to the scores of the tiles of a part, in powers of two."""

    def __init__(self, bias: Tensor | None, room: Room) -> None:
        self.bias, self.room = None if bias is None else bias.to(room.like.dtype) / LN2, room
        self._kept: dict[tuple[Run, ...], Tensor | None] = {}

    def add(self, scores: Tensor, tiles: Tiles) -> None:
        """Add it to [outer, inner, rows, keys]."""
        key = (tiles.run, *tiles.part.inner)
        if key not in self._kept:
            self._kept[key] = self._mask(tiles.part, tiles.run)
        mask = self._kept[key]
        if mask is None:
            return
        part = tiles.part
        if mask.ndim == 2:
            scores.view(-1, *mask.shape).add_(mask)
            return
        mask = mask[tiles.box[-1]]
        mask = mask[:, None] if tiles.by_strip else mask
        scores.view(*tiles.dims, part.group, -1, tiles.keys).add_(mask)

    def _mask(self, part: Part, run: Run) -> Tensor | None:
        """[sizes, keys], or [heads, group, sizes, keys] with a bias; None where all is seen."""
        like, seen = self.room.like, visible_in(part, run)
        if self.bias is None and bool(seen.all()):
            return None
        mask = like.new_zeros(seen.shape).masked_fill_(~seen.to(like.device), -torch.inf)
        if self.bias is None:
            return mask
        table = self.bias.flatten(1)[:, places_in(part, run).to(like.device)]
        return (mask + table).unflatten(0, (part.heads, part.group))


class _Strips:
    """Keys and values of some strips, and what is computed from them."""

    def __init__(self, part: Part, box: Any, k: Tensor, v: Tensor, room: Room) -> None:
        self.room = room
        self.k, self.v = self._copied(part, box, k, "k"), self._copied(part, box, v, "v")

    def _copied(self, part: Part, box: Any, x: Tensor, name: str) -> Tensor:
        view = part.strips(x)[box]
        count = math.prod(view.shape[: len(box)])
        out = self.room.take(name, count, part.length, part.wide, x.shape[-1])
        out.view(view.shape).copy_(view)
        return out

    def scores(self, tiles: Tiles, q: Tensor, masks: _Masks) -> Tensor:
        """Return the masked scores of queries [outer, inner, rows, D], [outer, inner, rows, keys]."""
        scores = self.room.take("scores", *tiles.shape(tiles.rows, tiles.keys))
        for rows, keys, to in zip(q, tiles.windows(self.k), scores, strict=True):
            torch.bmm(rows, keys.transpose(1, 2), out=to)
        masks.add(scores, tiles)
        return scores


def _parts(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], room: Room
) -> Iterator[tuple[Part, Any, _Strips]]:
    """The parts of a call, some strips at a time."""
    width, heads = k.shape[-1] + v.shape[-1], k.shape[-2]
    if not q.numel() or not v.numel():
        return
    for part in parts_of(axes, q.shape[0], heads, q.shape[-2] // heads, width):
        for box in part.boxes(q.shape[0], width):
            yield part, box, _Strips(part, box, k, v, room)
    room.close()


def _laid(x: Tensor, room: Room, name: str) -> Tensor:
    """x [B, X1.., H, D] with heads before the grid in memory, so that neighbours are near each other."""
    if x.stride(-2) > x.stride(-3) and x.stride(-1) == 1 and x.dtype == room.like.dtype:
        return x
    by_head = x.movedim(-2, 1)
    return room.take(name, *by_head.shape).copy_(by_head).movedim(1, -2)


def _empty(x: Tensor, width: int) -> Tensor:
    """Memory for [B, X1.., H, width], laid in the same way."""
    return x.new_empty(x.shape[0], x.shape[-2], *x.shape[1:-2], width).movedim(1, -2)


def _kind(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...], scale: float
) -> tuple[Tensor, Tensor]:
    kind, of = _kind(q), v.dtype
    room = Room(q.new_empty(0, dtype=kind))
    q, k, v = (_laid(x, room, name) for name, x in (("all q", q), ("all k", k), ("all v", v)))
    out, lse = _empty(q, v.shape[-1]), _empty(q, 1)
    masks, peaked = _Masks(bias, room), _needs_peak(q, k, scale, bias)
    for part, box, strips in _parts(q, k, v, axes, room):
        for tiles in tiles_of(part, box):
            scores = strips.scores(tiles, tiles.copied(q, room, "q").mul_(scale / LN2), masks)
            peak = scores.amax(-1, keepdim=True) if peaked else None
            scores = (scores if peak is None else scores.sub_(peak)).exp2_()
            total = scores.sum(-1, keepdim=True)
            found = room.take("out", *tiles.shape(tiles.rows, v.shape[-1]))
            for weights, values, to in zip(scores, tiles.windows(strips.v), found, strict=True):
                torch.bmm(weights, values, out=to)
            tiles.write(found.div_(total), out)
            total.log_()
            tiles.write(total if peak is None else total.add_(peak, alpha=LN2), lse)
    return out.to(of), lse[..., 0]


def _needs_peak(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> bool:
    """Whether the largest score of a row must be subtracted, so that sums of powers stay in range."""
    if q.device.type != "cpu" or not q.numel():
        return True
    kind = _kind(q)
    longest = [float(torch.linalg.vector_norm(x, dim=-1, dtype=kind).max()) for x in (q, k)]
    most = abs(scale) * longest[0] * longest[1] + (0.0 if bias is None else float(bias.abs().max()))
    return not most / LN2 < BOUND[kind]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...], scale: float, lse: Tensor,
    d_out: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and bias; `delta` [B, X1.., H] is out . d_out, less the gradient of lse."""
    kinds = q.dtype, k.dtype, v.dtype
    room = Room(lse)
    q, k, v = (_laid(x, room, name) for name, x in (("all q", q), ("all k", k), ("all v", v)))
    d_out = _laid(d_out, room, "all d_out")
    dq, dk, dv = _empty(q, q.shape[-1]), _empty(k, k.shape[-1]).zero_(), _empty(v, v.shape[-1]).zero_()
    d_bias = None if bias is None else _BiasGradient(bias, lse.dtype)
    masks, lse, delta = _Masks(bias, room), lse[..., None], delta[..., None]
    for part, box, strips in _parts(q, k, v, axes, room):
        into_k = room.take("dk", *strips.k.shape).zero_()
        into_v = room.take("dv", *strips.v.shape).zero_()
        for tiles in tiles_of(part, box):
            rows = tiles.copied(q, room, "q").mul_(scale / LN2)
            weights = strips.scores(tiles, rows, masks)
            weights = weights.sub_(tiles.copied(lse, room, "lse").div_(LN2)).exp2_()
            out = tiles.copied(d_out, room, "d_out")
            tiles.add(_across(weights, out, room, "boxes"), into_v)
            scores = room.take("d_scores", *weights.shape)
            for one, values, to in zip(out, tiles.windows(strips.v), scores, strict=True):
                torch.bmm(one, values.transpose(1, 2), out=to)
            scores.sub_(tiles.copied(delta, room, "delta")).mul_(weights)
            if d_bias is not None:
                d_bias.add(scores, tiles)
            tiles.add(_across(scores, rows, room, "boxes"), into_k)
            for one, keys, to in zip(scores, tiles.windows(strips.k), rows, strict=True):
                torch.bmm(one, keys, out=to)
            tiles.write(rows.mul_(scale), dq)
        _fold(into_k, part, box, dk)
        _fold(into_v, part, box, dv)
    found = None if d_bias is None or bias is None else d_bias.table.view(bias.shape).to(bias.dtype)
    return dq.to(kinds[0]), dk.mul_(LN2).to(kinds[1]), dv.to(kinds[2]), found


def _across(x: Tensor, rows: Tensor, room: Room, name: str) -> Tensor:
    """x^T rows, [outer, inner, keys, D]."""
    out = room.take(name, *x.shape[:2], x.shape[3], rows.shape[3])
    torch.bmm(x.flatten(0, 1).transpose(1, 2), rows.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _fold(strips: Tensor, part: Part, box: Any, x: Tensor) -> None:
    """Add strips to their places in x [B, X1.., H, D], in pieces that do not overlap."""
    lead = [s.stop - s.start for s in box]
    strips = strips.view(*lead, part.length, *(run.width for run in part.inner), strips.shape[-1])
    for pieces in itertools.product(*(pieces_of(run, run.count) for run in part.inner)):
        found: Any = (..., *(slice(at, at + size) for at, size in pieces), slice(None))
        part.strips(x, pieces)[box].add_(strips[found])


class _BiasGradient:
    """The gradient of a bias table, summed over tiles."""

    def __init__(self, bias: Tensor, kind: torch.dtype) -> None:
        self.table = bias.new_zeros(bias.shape, dtype=kind)
        self._places: dict[tuple[Run, ...], Tensor] = {}

    def add(self, scores: Tensor, tiles: Tiles) -> None:
        """Add gradients of scores [outer, inner, rows, keys]."""
        part, key = tiles.part, (tiles.run, *tiles.part.inner)
        if key not in self._places:
            self._places[key] = places_in(part, tiles.run).to(scores.device).flatten()
        found = scores.view(*tiles.dims, part.group, -1, tiles.keys)
        head = len(tiles.box) - tiles.by_strip
        over = [dim for dim in range(len(tiles.dims)) if dim != head]
        found = found.sum(over)  # [heads, group, sizes, keys]
        table = self.table.view(part.heads, part.group, -1)[tiles.box[-1]]
        table.index_add_(2, self._places[key], found.flatten(2))
