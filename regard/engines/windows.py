"""Softmax attention of the blocks of a grid to the windows around them, forward and backward.

    s = scale q k^T + sum_axes q . T_axis[u + before + kernel - 1 - reach i] + mask
    out = softmax(s) v;  lse = log sum exp(s)

over blocks of `stride` positions an axis, which see one window (`grids.py`); i is a query's place in its
block along an axis, u that of a key in the window, less what is before the block. Windows overlap by little,
so that each is copied whole and nothing is masked but causal order; `neighborhoods.py`, for windows that move
with their query, shares copies and masks. Scores stand with queries last, so that what is added by row and by
column of the window, and sums over keys, run along memory. They are in powers of two, and on a CPU are first
summed without their peak; where a sum is not well in range, that part is computed again with it.

Shapes: N = batch rows x blocks x heads; W keys in a window, A queries in a block, D numbers in a key.
Operations O(T W), memory O(T W / A), keys that are copied, for T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.grids import Axis
from regard.engines.tiles import Room
from regard.engines.window_parts import (
    LN2,
    Call,
    Part,
    Tables,
    Terms,
    chunks_of,
    parts_of,
    rimmed,
    rimmed_shape,
    unrimmed,
)

FEW, MANY = 2.0**-60, 2.0**60


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], *, scale: float, tables: Tables = (),
    every: int = 1, reach: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out [B, Y1.., H, Dv] in the dtype of v and lse [B, Y1.., H], float32 or from float64 float64.

    Args:
        q: [B, Y1.., H, D], of any strides; Y = ceil(X / every).
        k, v: [B, X1.., H, D] and [B, X1.., H, Dv].
        axes: the rule of each, with border `cut` or `zero` and no dilation; blocks are their strides.
        scale: factor on q k^T.
        tables: one an axis, [2 kernel - 1, D], or none.
        every: queries are at each such position along every axis; it divides the strides.
        reach: how far apart in a table two queries are that follow each other.

    Example:
        >>> q, k, v = torch.randn(3, 1, 16, 24, 2, 8)
        >>> axes = Axis(16, 8, 4, border="cut"), Axis(24, 8, 4, border="cut")
        >>> out, lse = attend_windows(q, k, v, axes, scale=0.3)
        >>> tuple(out.shape), tuple(lse.shape)
        ((1, 16, 24, 2, 8), (1, 16, 24, 2))
    """
    given = Call(axes, scale, every, reach)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *tables)):
        found: tuple[Tensor, Tensor] = _AttendWindows.apply(q, k, v, given, *tables)
        return found
    with torch.no_grad():
        return _forward(q, k, v, tables, given)


class _AttendWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: Call, *tables: Tensor) -> Any:
        out, lse = _forward(q, k, v, tables, given)
        ctx.save_for_backward(q, k, v, out, lse, *tables)
        ctx.given = given
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v, out, lse, *tables = ctx.saved_tensors
        with torch.no_grad():
            delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).sub_(d_lse)
            dq, dk, dv, *more = _backward(q, k, v, tuple(tables), ctx.given, lse, d_out, delta)
        return dq, dk, dv, None, *more


class _Blocks:
    """Queries, keys and values of a part, copied, and what is computed from them."""

    def __init__(self, part: Part, q: Tensor, k: Tensor, v: Tensor, tables: Tables, room: Room) -> None:
        self.part, self.room = part, room
        self.rows, self.keys = part.rows(q, room, "rows"), part.keys(k, room, "keys")
        self.values = part.keys(v, room, "values")
        self.terms = Terms(part, tables, self.rows, room) if tables else None
        self.hidden = part.hidden(room.like)

    def scores(self, chosen: slice) -> Tensor:
        """Return scores of some blocks, [n, W, A], in powers of two."""
        keys, rows = self.keys[chosen], self.rows[chosen].mT
        scores = self.room.take("scores", len(keys), self.part.w, self.part.a)
        alpha = self.part.given.scale / LN2
        if self.terms is None:
            torch.baddbmm(scores, keys, rows, beta=0, alpha=alpha, out=scores)
        else:
            self.terms.add_to(scores, chosen)
            scores.baddbmm_(keys, rows, alpha=alpha)
        return scores if self.hidden is None else scores.add_(self.hidden)

    def powers(self, chosen: slice, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return 2^(scores - peak), and the peak where one was needed, and write the sums into `total`."""
        scores = self.scores(chosen)
        if scores.device.type == "cpu":
            torch.sum(scores.exp2_(), 1, keepdim=True, out=total)
            least, most = torch.aminmax(total)
            if float(least) > FEW and float(most) < MANY:
                return scores, None
            scores = self.scores(chosen)
        peak = scores.amax(1, keepdim=True)
        torch.sum(scores.sub_(peak).exp2_(), 1, keepdim=True, out=total)
        return scores, peak


def _forward(q: Tensor, k: Tensor, v: Tensor, tables: Tables, given: Call) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    room, tables = Room(q.new_empty(0, dtype=kind)), tuple(table.to(kind) for table in tables)
    out, lse = _empty(q, v.shape[-1], v.dtype), _empty(q, 1, kind)
    if not q.numel() or not v.numel():
        return out, lse[..., 0]
    rim = given.rim()
    k, v = rimmed(k, rim, room, "k"), rimmed(v, rim, room, "v")
    for part in parts_of(q, given):
        blocks = _Blocks(part, q, k, v, tables, room)
        found = room.take("out", part.n, v.shape[-1], part.a)
        sums = room.take("sums", part.n, 1, part.a)
        for chosen in chunks_of(part, q.device):
            total = sums[chosen]
            weights, peak = blocks.powers(chosen, total)
            torch.bmm(blocks.values[chosen].mT, weights, out=found[chosen]).div_(total)
            total.log_()
            if peak is not None:
                total.add_(peak, alpha=LN2)
        for x, into in ((found, out), (sums, lse)):
            view = part.queries(into)
            view.copy_(x.view(view.shape))
    room.close()
    return out, lse[..., 0]


def _empty(q: Tensor, width: int, kind: torch.dtype) -> Tensor:
    """Memory for [B, Y1.., H, width], laid as [B, H, width, Y1..]."""
    x = q.new_empty(q.shape[0], q.shape[-2], width, *q.shape[1:-2], dtype=kind)
    return x.movedim((1, 2), (-2, -1))


def _backward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, given: Call, lse: Tensor, d_out: Tensor, delta: Tensor
) -> list[Tensor]:
    """Gradients of q, k, v and the tables; `delta` [B, Y1.., H] is out . d_out, less the gradient of lse."""
    kinds, grid, kind = [x.dtype for x in (q, k, v, *tables)], k.shape[1:-2], lse.dtype
    room, tables, rim = Room(lse), tuple(table.to(kind) for table in tables), given.rim()
    dq = q.new_empty(q.shape, dtype=kind)
    dk, dv = (
        room.take(name, *rimmed_shape(x, rim)).zero_().movedim(1, -2) for name, x in (("dk", k), ("dv", v))
    )
    d_tables = [torch.zeros_like(table) for table in tables]
    k, v = rimmed(k, rim, room, "k"), rimmed(v, rim, room, "v")
    lse, delta = lse[..., None], delta[..., None]
    for part in parts_of(q, given) if q.numel() and v.numel() else ():
        blocks = _Blocks(part, q, k, v, tables, room)
        wanted, share = part.columns(d_out, room, "wanted"), part.columns(delta, room, "share")
        of_rows, of_keys, of_values = _of_blocks(blocks, wanted, part.columns(lse, room, "sums"), share)
        if blocks.terms is not None:
            blocks.terms.into(of_rows, d_tables)
        view = part.queries(dq).movedim(len(given.axes) + 2, -1)
        view.copy_(of_rows.view(view.shape))
        part.fold(of_keys, dk)
        part.fold(of_values, dv)
    dk, dv = unrimmed(dk, rim, grid) * given.scale, unrimmed(dv, rim, grid).clone()
    room.close()
    return [x.to(of) for x, of in zip((dq, dk, dv, *d_tables), kinds, strict=True)]


def _of_blocks(blocks: _Blocks, wanted: Tensor, lse: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, which lack those by position, of the keys over the scale, and of the values.

    With p the weights, scores have the gradient p (v . wanted - share); it is kept for the terms by position.
    """
    part, room, terms = blocks.part, blocks.room, blocks.terms
    of_rows = room.take("d rows", *blocks.rows.shape)
    of_keys, of_values = (
        room.take("d keys", *blocks.keys.shape), room.take("d values", *blocks.values.shape),
    )  # fmt: skip
    lse.div_(LN2)
    if terms is not None:
        terms.gradients()
        terms.each[0].sub_(lse)
    for chosen in chunks_of(part, lse.device):
        scores = blocks.scores(chosen)
        weights = (scores.sub_(lse[chosen]) if terms is None else scores).exp2_()
        torch.bmm(weights, wanted[chosen].mT, out=of_values[chosen])
        scores = room.take("d scores", *weights.shape)
        torch.bmm(blocks.values[chosen], wanted[chosen], out=scores).sub_(share[chosen]).mul_(weights)
        torch.bmm(scores, blocks.rows[chosen], out=of_keys[chosen])
        torch.bmm(scores.mT, blocks.keys[chosen], out=of_rows[chosen])
        if terms is not None:
            terms.sum(scores, chosen)
    return of_rows.mul_(part.given.scale), of_keys, of_values
