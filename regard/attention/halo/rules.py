"""What blocks with a halo are: options, checked, as rules of the window builder (`engines/grids.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.engines.grids import Axis
from regard.errors import RegardError, ShapeMismatch

Numbers = int | Sequence[int]
BORDERS = {"zero": "zero", "mask": "cut"}
PADS, STRIDES, MOST_AXES = ("error", "auto"), (1, 2), 3


def options_of(
    count: int, block: Any, halo: Any, border: Any = "zero", stride: Any = 1, rel_stride: Any = None,
    pad: Any = "error", is_causal: Any = False,
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """Return block and halo of each of `count` axes.

    Raises:
        RegardError: where the options are not what halo attention can have on any map.
    """
    blocks, halos = _each("block", block, count, 1), _each("halo", halo, count, 0)
    for name, value, known in (
        ("border", border, tuple(BORDERS)), ("stride", stride, STRIDES), ("pad", pad, PADS),
        ("rel_stride", rel_stride, (None, *STRIDES)),
    ):  # fmt: skip
        if isinstance(value, bool) or value not in known:
            raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}.")
    odd = [size for size in blocks if size % stride]
    if odd:
        raise RegardError(f"block is {odd[0]} with stride 2; it must be even, or the output averaged 2 x 2.")
    if not isinstance(is_causal, bool) or (is_causal and (count != 1 or stride != 1)):
        raise RegardError("is_causal needs a line, a map of one axis, and stride 1.")
    return tuple(zip(blocks, halos, strict=True))


def _each(name: str, given: Any, count: int, least: int) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, list | tuple) else (given,) * count
    if len(values) != count:
        raise RegardError(f"{name} is {given!r}; it must be one number or {count}, one for each axis.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in values):
        raise RegardError(f"{name} is {given!r}; it must be whole numbers from {least}.")
    return values


def axes_of(
    grid: Sequence[int], options: Sequence[tuple[int, int]], border: str, pad: str, is_causal: bool = False
) -> tuple[Axis, ...]:
    """Return the rule of each axis of a map.

    Raises:
        ShapeMismatch: where blocks do not divide the map, and `pad` is "error".
    """
    wrong = [n % b for n, (b, _) in zip(grid, options, strict=True)]
    if pad == "error" and any(wrong):
        blocks, told = [b for b, _ in options], " x ".join(map(str, grid))
        wanted = " x ".join(str(-(-n // b) * b) for n, b in zip(grid, blocks, strict=True))
        raise ShapeMismatch(
            f"the map is {told}, which blocks of {' x '.join(map(str, blocks))} do not divide; it must be "
            f'{wanted}, or pad="auto".'
        )
    return tuple(
        Axis(int(n), b + (1 if is_causal else 2) * h, b, causal=is_causal, border=BORDERS[border])
        for n, (b, h) in zip(grid, options, strict=True)
    )


def check_maps(q: Tensor, k: Tensor, v: Tensor, stride: int) -> None:
    """Refuse queries, keys and values that are not of one map.

    Raises:
        ShapeMismatch: where shapes or dtypes do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not 4 <= x.ndim <= MOST_AXES + 3 or not x.is_floating_point():
            raise ShapeMismatch(
                f"{name} is {x.dtype} {list(x.shape)}; it must be floating-point [batch, 1 to {MOST_AXES} "
                "axes, heads, dim]."
            )
    grid = [-(-n // stride) for n in k.shape[1:-2]]
    if k.shape[:-1] != v.shape[:-1] or (*k.shape[:1], *grid, *k.shape[-2:]) != tuple(q.shape):
        raise ShapeMismatch(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: k and v must be of one "
            f"map and heads, and q {[k.shape[0], *grid, *k.shape[-2:]]} with stride {stride}."
        )
    if not all(k.shape[1:]) or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ShapeMismatch(
            f"q is {q.dtype} {list(q.shape)}, k {k.dtype} and v {v.dtype}; a map must have positions, heads "
            "and a width, and all be of one dtype and device."
        )


def check_tables(rel: Any, axes: Sequence[Axis], width: int) -> tuple[Tensor, ...]:
    """Return the tables of relative positions, one an axis, or none.

    Raises:
        ShapeMismatch: where one is of another shape.
    """
    if rel is None:
        return ()
    several = isinstance(rel, list | tuple) or (isinstance(rel, Tensor) and rel.ndim == 3)
    tables = tuple(rel) if several else (rel,)
    wanted = [[2 * axis.kernel - 1, width] for axis in axes]
    if not all(isinstance(table, Tensor) for table in tables) or [list(x.shape) for x in tables] != wanted:
        found = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in tables]
        raise ShapeMismatch(
            f"rel must be one table an axis, {wanted}, 2 (block + 2 halo) - 1 rows of the width of a query, "
            f"and is {found}."
        )
    return tables


def windows_of(axis: Axis, every: int, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys of each query along an axis, whether they count, and rows of the table, [queries, kernel].

    Keys outside the map, which may count as zeros, have negative numbers or such from the length on.
    """
    at = torch.arange(0, axis.length, every)
    first = at // axis.stride * axis.stride
    keys = (first - axis.before)[:, None] + torch.arange(axis.kernel)
    inside = (keys >= 0) & (keys < axis.length)
    open_end = axis.border == "zero" and axis.length % axis.stride == 0
    counts = inside | ((keys < 0) & (axis.border == "zero")) | ((keys >= axis.length) & open_end)
    if axis.causal:
        counts = counts & (keys <= at[:, None])
    rows = axis.kernel - 1 + torch.arange(axis.kernel) - reach * ((at - first) // every)[:, None]
    return keys, counts, rows
