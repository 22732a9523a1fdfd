"""Halo attention as a function of q, k and v, heads last but one, as in `na2d`.

    s = scale q_i . k_u + sum_axes q_i . T_axis[w - 1 + u - r i]        w = block + 2 halo
    o_i = softmax_u(s) v_u                                              u over the window of i's block

Queries of one block see one window, the block and a halo around it; i and u count from the beginning of block
and window, r = rel_stride. A key at no distance is row w - 1 + halo; the first 2 halo rows are unused.

Source: Vaswani et al., 2021, arXiv 2103.12731, section 2. Status: agrees with timm 1.0.31 (HaloAttn) by
running both, border "zero", rel_stride 1; whether the authors masked the border is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.halo.rules import (
    Numbers,
    axes_of,
    check_maps,
    check_tables,
    options_of,
    windows_of,
)
from regard.engines.grids import Axis
from regard.engines.windows import attend_windows
from regard.errors import RegardError

IMPLS = ("windows", "dense")


def halo_attention(
    q: Tensor, k: Tensor, v: Tensor, block: Numbers, halo: Numbers,
    rel: Tensor | Sequence[Tensor] | None = None,
    border: str = "zero", stride: int = 1, *, rel_stride: int | None = None, scale: float | None = None,
    pad: str = "error", is_causal: bool = False, return_lse: bool = False, impl: str = "windows",
) -> Any:  # fmt: skip
    """Return attention of each block to its window, [B, Y1.., H, Dv].

    Args:
        q: [B, Y1.., H, D] of a line, plane or volume; with stride 2 that of every second position, Y =
            ceil(X / 2).
        k, v: [B, X1.., H, D] and [B, X1.., H, Dv].
        block: b, positions along an axis that share a window, from 1; one for all axes or one for each.
        halo: h, positions before and after the block that the window has as well, from 0; likewise.
        rel: tables of relative positions, one an axis, [2 (b + 2 h) - 1, D], which the heads share; in a
            sequence, or stacked.
        border: "zero", windows that reach outside see keys and values of zeros there, which take weight, or
            "mask", they see nothing there.
        stride: of the queries, 1 or 2; 2 needs even blocks.
        rel_stride: how far queries that follow each other are apart in `rel`; by default the stride, which
            makes rows of `rel` true offsets. timm has 1.
        scale: factor on q k^T; default 1 / sqrt(D).
        pad: "error", or "auto" for maps that blocks do not divide: the last block is shorter, and past it
            nothing is seen.
        is_causal: of a line: no key after the query, and a halo before the block alone; w = b + h.
        return_lse: whether to return the logsumexp of the scores as well, [B, Y1.., H].
        impl: "windows", the fast path on any device, or "dense", the definition.

    Raises:
        ShapeMismatch: where tensors do not fit together, or blocks do not divide the map.
        RegardError: where an option is not what it can be.

    Example:
        >>> q, k, v = torch.randn(3, 1, 16, 24, 2, 8)
        >>> halo_attention(q, k, v, block=8, halo=3).shape
        torch.Size([1, 16, 24, 2, 8])
        >>> halo_attention(q[:, ::2, ::2], k, v, block=8, halo=3, stride=2).shape
        torch.Size([1, 8, 12, 2, 8])
    """
    options = options_of(max(1, q.ndim - 3), block, halo, border, stride, rel_stride, pad, is_causal)
    check_maps(q, k, v, stride)
    axes = axes_of(k.shape[1:-2], options, border, pad, is_causal)
    tables = check_tables(rel, axes, q.shape[-1])
    if impl not in IMPLS:
        raise RegardError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}.")
    scale, reach = q.shape[-1] ** -0.5 if scale is None else scale, rel_stride or stride
    if impl == "dense":
        out, lse = attend_dense(q, k, v, axes, scale, tables, stride, reach)
    else:
        out, lse = attend_windows(q, k, v, axes, scale=scale, tables=tables, every=stride, reach=reach)
    return (out, lse) if return_lse else out


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], scale: float, tables: tuple[Tensor, ...],
    every: int, reach: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out and logsumexp by the definition: the window of every query is gathered."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = scores_of(q.to(kind), k.to(kind), axes, scale, tables, every, reach)
    weights = torch.softmax(scores, -1)
    out = torch.einsum("...w,...wd->...d", weights, gathered(v.to(kind), axes, every))
    return out.to(v.dtype), scores.logsumexp(-1)


def scores_of(
    q: Tensor, k: Tensor, axes: tuple[Axis, ...], scale: float, tables: tuple[Tensor, ...], every: int,
    reach: int,
) -> Tensor:  # fmt: skip
    """Return the scores of queries with their windows, [B, Y1.., H, W], -inf where nothing is seen."""
    scores = scale * torch.einsum("...d,...wd->...w", q, gathered(k, axes, every))
    count = len(axes)
    shape = [axis.kernel for axis in axes]
    seen = torch.ones((), dtype=torch.bool, device=q.device)
    for number, axis in enumerate(axes):
        _, counts, rows = (x.to(q.device) for x in windows_of(axis, every, reach))
        place, width = [1] * count, [1] * count
        place[number], width[number] = -1, axis.kernel
        seen = seen & counts.view(*place, *width)
        if tables:
            term = _by_place(q, tables[number], rows, number).unflatten(-1, width)
            scores = scores + term.expand(*term.shape[:-count], *shape).flatten(-count)
    grid = [len(range(0, axis.length, every)) for axis in axes]
    seen = seen.expand(*grid, *shape).flatten(count)[..., None, :]
    return scores.masked_fill(~seen, -torch.inf)


def _by_place(q: Tensor, table: Tensor, rows: Tensor, axis: int) -> Tensor:
    """q . table[rows] of the place along an axis, [B, Y1.., H, kernel]."""
    by_axis = q.movedim(axis + 1, 1)
    found = torch.einsum("by...d,ywd->by...w", by_axis, table.to(q.dtype)[rows])
    return found.movedim(1, axis + 1)


def gathered(x: Tensor, axes: tuple[Axis, ...], every: int) -> Tensor:
    """Return the window of every query, [B, Y1.., H, W, D], zeros outside the map."""
    count = len(axes)
    for number, axis in enumerate(axes):
        keys, _, _ = windows_of(axis, every, 1)
        last = (axis.length - 1) // axis.stride * axis.stride - axis.before
        before, after = max(0, axis.before), max(0, last + axis.kernel - axis.length)
        at = 2 * number + 1
        sides = [0, 0] * (x.ndim - 1 - at)
        x = F.pad(x, (*sides, before, after))
        x = x.index_select(at, (keys + before).flatten().to(x.device)).unflatten(at, keys.shape)
    x = x.movedim(tuple(2 * i + 2 for i in range(count)), tuple(range(count + 2, 2 * count + 2)))
    return x.flatten(count + 2, 2 * count + 1)
