"""The attention weights of chosen queries of a grid, with their far keys written out as zeros.

    A_ij = softmax_j(scale q_i . k_j [+ bias])       j the neighbours of i, for the chosen i alone

Memory is Q N, so that a large plane can be gone through in parts. Status: agrees with `na2d` by definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.engines.grids import Axis


def weights_of(
    q: Tensor, k: Tensor, axes: Sequence[Axis], queries: Tensor, *, scale: float, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return the weights of chosen queries, [B, H, Q, N].

    Args:
        q, k: [B, H, N, D], N the positions of the grid, the last axis fastest.
        axes: of the grid.
        queries: int64 [Q], which positions.
        scale: factor on q k^T.
        bias: [H, 2 k1 - 1, ..], by relative position, or None.

    Example:
        >>> q, k = torch.randn(2, 1, 2, 20, 8)
        >>> weights_of(q, k, (Axis(4, 3), Axis(5, 3)), torch.tensor([7]), scale=0.3).gt(0).sum().item()
        18
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q[:, :, queries].to(kind) @ k.to(kind).transpose(-1, -2) * scale
    seen, places = _seen(axes, queries)
    if bias is not None:
        scores = scores + bias.to(kind).flatten(1)[:, places]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _seen(axes: Sequence[Axis], queries: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys the queries see, bool [Q, N], and where in a bias table each pair stands, int64 [Q, N]."""
    own: list[Tensor] = []
    rest = queries
    for axis in reversed(axes):
        own.insert(0, rest % axis.length)
        rest = rest // axis.length
    seen = torch.ones(len(queries), 1, dtype=torch.bool, device=queries.device)
    place = torch.zeros(len(queries), 1, dtype=torch.int64, device=queries.device)
    for axis, at in zip(axes, own, strict=True):
        near = axis.visible().to(queries.device)[at]
        keys = torch.arange(axis.length, device=queries.device) // axis.dilation
        apart = (keys - at[:, None] // axis.dilation + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        seen = (seen[:, :, None] & near[:, None]).flatten(1)
        place = (place[:, :, None] * (2 * axis.kernel - 1) + apart[:, None]).flatten(1)
    return seen, place
