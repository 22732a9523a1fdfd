"""Attention of a plane with its weights in the open: the two functions of natten before version 0.20.

    scores = natten2dqkrpb(q, k, rpb, k, d)          [B, H, X, Y, k^2], neighbours in order
    out = natten2dav(scores.softmax(-1), v, k, d)    [B, H, X, Y, Dv]

Heads come first here. Memory is X Y k^2; `na2d` computes the same without. transformers' DiNAT imports these.

Source: natten 0.17, functional.py. Status: agrees with its CPU kernels by definition; see docs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.neighborhood.rules import axes_of, check_bias, index_of
from regard.engines.grids import Axis
from regard.errors import RegardError, ShapeMismatch


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int = 1
) -> Tensor:  # fmt: skip
    """Return the scores of each query with its neighbours, [B, H, X, Y, k^2], the row of the window slowest.

    Args:
        query, key: [B, H, X, Y, D]; nothing is scaled.
        rpb: [H, 2 k - 1, 2 k - 1], or None.
        kernel_size: k, odd.
        dilation: distance between neighbours.

    Raises:
        ShapeMismatch: where shapes do not fit.
        RegardError: where the window does not fit the plane.

    Example:
        >>> q, k = torch.randn(2, 1, 3, 8, 9, 4)
        >>> natten2dqkrpb(q, k, torch.zeros(3, 5, 5), 3, 1).shape
        torch.Size([1, 3, 8, 9, 9])
    """
    if query.ndim != 5 or query.shape != key.shape:
        raise ShapeMismatch(
            "query and key must be [B, H, X, Y, D] of one shape, and are "
            f"{list(query.shape)} and {list(key.shape)}."
        )
    axes = _axes(query, kernel_size, dilation)
    check_bias(rpb, axes, query.shape[1])
    index = index_of(axes).to(query.device)
    near = key.flatten(2, 3)[:, :, index]  # [B, H, N, k^2, D]
    scores = (near @ query.flatten(2, 3)[..., None])[..., 0]
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, _places(axes, index)].to(scores.dtype)
    return scores.unflatten(2, query.shape[2:4])


def natten2dav(attention: Tensor, value: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """Return the mean of each query's neighbours by their weights, [B, H, X, Y, Dv].

    Args:
        attention: [B, H, X, Y, k^2], as `natten2dqkrpb` orders them.
        value: [B, H, X, Y, Dv].
        kernel_size, dilation: as in `natten2dqkrpb`.
    """
    axes = _axes(value, kernel_size, dilation)
    if attention.shape != (*value.shape[:4], kernel_size**2):
        raise ShapeMismatch(
            f"attention must be {[*value.shape[:4], kernel_size**2]}, and is {list(attention.shape)}."
        )
    near = value.flatten(2, 3)[:, :, index_of(axes).to(value.device)]
    out = (attention.flatten(2, 3)[..., None, :] @ near)[..., 0, :]
    return out.unflatten(2, value.shape[2:4])


def _axes(x: Tensor, kernel_size: int, dilation: int) -> tuple[Axis, ...]:
    if not isinstance(kernel_size, int) or kernel_size % 2 == 0:
        raise RegardError(f"kernel_size is {kernel_size!r}; it must be odd.")
    return axes_of(x.shape[2:4], kernel_size, dilation=dilation)


def _places(axes: tuple[Axis, ...], index: Tensor) -> Tensor:
    """Where in a bias table each query and neighbour stand, int64 [N, k^2]."""
    (rows, columns), width = axes, axes[1].length
    own = torch.arange(rows.length * width, device=index.device)[:, None]
    kernel = rows.kernel
    down = index // width // rows.dilation - own // width // rows.dilation
    right = index % width // columns.dilation - own % width // columns.dilation
    return (down + kernel - 1) * (2 * kernel - 1) + right + kernel - 1
