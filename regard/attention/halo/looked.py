"""The weights of chosen queries of halo attention over all keys of a map; only theirs are computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.attention.halo.rules import windows_of
from regard.engines.grids import Axis


def weights_of(
    q: Tensor, k: Tensor, axes: tuple[Axis, ...], scale: float, tables: tuple[Tensor, ...], every: int,
    reach: int, chosen: Tensor,
) -> Tensor:  # fmt: skip
    """Return weights [B, H, Q, X1 X2..], 0 where nothing is seen; what padding takes is left out.

    Args:
        q, k: [B, Y1.., H, D] and [B, X1.., H, D].
        axes, scale, tables, every, reach: as `attend_windows` takes them.
        chosen: int64 [Q], queries by number, the last axis fastest.
    """
    count = len(axes)
    q, k = q.flatten(1, count)[:, chosen], k.flatten(1, count)
    at = torch.unravel_index(chosen, [len(range(0, axis.length, every)) for axis in axes])
    keys = torch.zeros(len(chosen), 1, dtype=torch.int64, device=k.device)
    there, seen = torch.ones_like(keys, dtype=torch.bool), torch.ones_like(keys, dtype=torch.bool)
    placed = q.new_zeros(*q.shape[:3], 1)
    for number, axis in enumerate(axes):
        near, counts, rows = (x.to(k.device)[at[number]] for x in windows_of(axis, every, reach))
        inside = (near >= 0) & (near < axis.length)
        keys = _joined(keys * axis.length, near.clamp(0, axis.length - 1))
        there, seen = _joined(there, inside, both=True), _joined(seen, counts, both=True)
        term = torch.zeros_like(placed[..., :1]).expand(*placed.shape[:3], axis.kernel)
        if tables:
            term = torch.einsum("bqhd,qwd->bqhw", q, tables[number].to(q.dtype)[rows])
        placed = (placed[..., :, None] + term[..., None, :]).flatten(3)
    own = k[:, keys] * there[..., None, None]  # [B, Q, W, H, D]
    scores = scale * torch.einsum("bqhd,bqwhd->bqhw", q, own) + placed
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) * there[:, None]
    found = weights.new_zeros(*weights.shape[:3], math.prod(axis.length for axis in axes))
    found.scatter_add_(3, keys[:, None].expand_as(weights), weights)
    return found.transpose(1, 2)


def _joined(one: Tensor, other: Tensor, both: bool = False) -> Tensor:
    """[Q, a] and [Q, b], their sums or what holds of both, as [Q, a b]."""
    pairs = one[:, :, None], other[:, None, :]
    return (pairs[0] & pairs[1] if both else pairs[0] + pairs[1]).flatten(1)
