"""What a neighbourhood is: the arguments of NATTEN, checked, and as masks and lists of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.engines.grids import Axis
from regard.errors import RegardError, ShapeMismatch

Numbers = int | Sequence[int]
Flags = bool | Sequence[bool]
MOST_AXES = 3


def axes_of(
    grid: Sequence[int],
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: Flags = False,
) -> tuple[Axis, ...]:
    """Return the rule of each axis of a grid.

    Args:
        grid: positions along each axis.
        kernel_size, stride, dilation, is_causal: one for all axes or one for each.

    Raises:
        RegardError: where they are not what a neighbourhood can be on this grid.

    Example:
        >>> [axis.kernel for axis in axes_of((20, 9), (7, 3), is_causal=(True, False))]
        [7, 3]
    """
    options = options_of(len(grid), kernel_size, stride, dilation, is_causal)
    axes = tuple(Axis(int(n), k, s, d, c) for n, (k, s, d, c) in zip(grid, options, strict=True))
    for number, axis in enumerate(axes):
        if axis.kernel * axis.dilation > axis.length:
            raise RegardError(
                f"kernel_size times dilation is {axis.kernel} x {axis.dilation} on axis {number}, which has "
                f"{axis.length} positions; it must not be more."
            )
    return axes


def options_of(
    count: int, kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False
) -> tuple[tuple[int, int, int, bool], ...]:
    """Return kernel, stride, dilation and order of each of `count` axes.

    Raises:
        RegardError: where they are not what a neighbourhood can be on any grid.
    """
    kernels = _each("kernel_size", kernel_size, count, 2)
    strides = _each("stride", stride, count, 1)
    dilations = _each("dilation", dilation, count, 1)
    for k, s in zip(kernels, strides, strict=True):
        if s > k:
            raise RegardError(
                f"stride is {s} and kernel_size {k}; a stride must not be above its kernel size."
            )
    causal = tuple(is_causal) if isinstance(is_causal, list | tuple) else (is_causal,) * count
    if len(causal) != count:
        raise RegardError(f"is_causal is {is_causal!r}; it must be one bool or {count}, one for each axis.")
    if not all(isinstance(flag, bool) for flag in causal):
        raise RegardError(
            f"is_causal is {is_causal!r}; it must be True or False, or one of them for each axis."
        )
    return tuple(zip(kernels, strides, dilations, causal, strict=True))


def _each(name: str, given: Any, count: int, least: int) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, list | tuple) else (given,) * count
    if len(values) != count:
        raise RegardError(f"{name} is {given!r}; it must be one number or {count}, one for each axis.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in values):
        raise RegardError(f"{name} is {given!r}; it must be whole numbers from {least}.")
    return values


def neighborhood_mask(
    shape: Numbers,
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: Flags = False,
) -> Tensor:
    """Return which keys each query of a grid sees, for looking at or for attention with a dense mask.

    Args:
        shape: positions along each of 1 to 3 axes; a number for one axis.
        kernel_size: keys along an axis, from 2; one for all axes or one for each, as the options below.
        stride: so many queries in a row share a window.
        dilation: distance between the keys of a window.
        is_causal: whether an axis has an order.

    Returns:
        bool [N, N], N positions with the last axis fastest.

    Raises:
        RegardError: where the options do not fit the grid.

    Example:
        >>> neighborhood_mask(5, 3).int().tolist()[:2]
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
        >>> neighborhood_mask((4, 4), 3).sum(1).unique().tolist()
        [9]
    """
    return mask_of(axes_of(_grid(shape), kernel_size, stride, dilation, is_causal))


def neighborhood_index(
    shape: Numbers,
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: Flags = False,
) -> Tensor:
    """Return the keys that each query of a grid sees, as `regard.engines.blocks` takes them.

    Args:
        shape, kernel_size, stride, dilation, is_causal: as in `neighborhood_mask`.

    Returns:
        int64 [N, n], n the product of the kernel sizes; keys in ascending order, and -1 where causal order
        leaves fewer.

    Example:
        >>> neighborhood_index(5, 3, is_causal=True).tolist()[:3]
        [[-1, -1, 0], [-1, 0, 1], [0, 1, 2]]
    """
    return index_of(axes_of(_grid(shape), kernel_size, stride, dilation, is_causal))


def _grid(shape: Any) -> tuple[int, ...]:
    grid = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    if not 1 <= len(grid) <= MOST_AXES or not all(isinstance(n, int) and n > 0 for n in grid):
        raise RegardError(f"shape is {shape!r}; it must be 1 to {MOST_AXES} numbers of positions, above 0.")
    return grid


def mask_of(axes: Sequence[Axis]) -> Tensor:
    """Return the product of the axes' masks, bool [N, N]."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        seen = (seen[:, None, :, None] & axis.visible()[None, :, None, :]).flatten(2).flatten(0, 1)
    return seen


def index_of(axes: Sequence[Axis]) -> Tensor:
    """Return the keys that each query sees, int64 [N, n], padded with -1 in front."""
    index = torch.zeros(1, 1, dtype=torch.int64)
    for axis in axes:
        seen, at = axis.visible(), torch.arange(axis.length)
        most = min(axis.kernel, int(seen.sum(1).max()))
        own = torch.where(seen, at, -1).sort(1).values[:, axis.length - most :]
        joined = index[:, None, :, None] * axis.length + own[None, :, None, :]
        there = (index >= 0)[:, None, :, None] & (own >= 0)[None, :, None, :]
        index = torch.where(there, joined, -1).flatten(2).flatten(0, 1)
    return index.sort(1).values


def check_grids(q: Tensor, k: Tensor, v: Tensor, count: int) -> None:
    """Refuse queries, keys and values that are not of one grid of `count` axes.

    Raises:
        ShapeMismatch: where shapes or dtypes do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != count + 3 or not x.is_floating_point():
            axes = ", ".join(f"X{i + 1}" for i in range(count))
            raise ShapeMismatch(
                f"{name} must be floating-point [batch, {axes}, heads, dim], and is "
                f"{x.dtype} {list(x.shape)}."
            )
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ShapeMismatch(
            f"q, k and v must be of one batch and grid, and are {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}."
        )
    if k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1] or q.shape[-2] % max(1, k.shape[-2]):
        raise ShapeMismatch(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: k and v must have "
            "as many heads, which divide those of q, and keys be as wide as queries."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ShapeMismatch(
            f"q, k and v must be of one dtype and device, and are {q.dtype}, {k.dtype}, {v.dtype}."
        )


def check_bias(rpb: Tensor | None, axes: Sequence[Axis], heads: int) -> None:
    """Refuse a table of position biases that does not fit.

    Raises:
        RegardError: where an axis is causal, for which NATTEN has no such bias.
        ShapeMismatch: where its shape is another.
    """
    if rpb is None:
        return
    if any(axis.causal for axis in axes):
        raise RegardError("rpb was given with is_causal; a position bias is not defined in causal order.")
    wanted = (heads, *(2 * axis.kernel - 1 for axis in axes))
    if tuple(rpb.shape) != wanted:
        raise ShapeMismatch(f"rpb must be {list(wanted)}, 2 k - 1 an axis, and is {list(rpb.shape)}.")


def check_additional(keys: Tensor | None, values: Tensor | None, k: Tensor, v: Tensor) -> None:
    """Refuse additional keys and values that do not fit the others, or one without the other."""
    if (keys is None) != (values is None):
        raise RegardError("additional_keys and additional_values must be given together.")
    if keys is None or values is None:
        return
    fits = keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] and keys.shape[1] > 0
    wanted = (k.shape[0], k.shape[-2], k.shape[-1], v.shape[-1])
    if not fits or (keys.shape[0], *keys.shape[2:], values.shape[3]) != wanted or keys.dtype != k.dtype:
        raise ShapeMismatch(
            f"additional_keys and additional_values must be [{wanted[0]}, M, {wanted[1]}, {wanted[2]} and "
            f"{wanted[3]}] of {k.dtype}, M above 0, and are {list(keys.shape)} and {list(values.shape)}."
        )
