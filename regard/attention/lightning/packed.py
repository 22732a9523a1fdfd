"""Sequences packed into one: where they begin, and the same as a batch with padding at the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch


def starts_of(cu_seqlens: Tensor | Sequence[int], q: Tensor) -> Tensor:
    """Return bounds of packed sequences, int64 [N + 1].

    Args:
        cu_seqlens: begins with 0, never falls, and ends with the length of q.
        q: [1, H, T, D].

    Raises:
        RegardError: where it is not so.
        ShapeMismatch: for a batch of several.
    """
    if q.shape[0] != 1:
        raise ShapeMismatch(f"cu_seqlens packs sequences into a batch of one, and q is {list(q.shape)}.")
    bounds = torch.as_tensor(cu_seqlens, device=q.device)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds.is_floating_point() or bounds.dtype == torch.bool:
        raise RegardError("cu_seqlens must be whole numbers, [number of sequences + 1].")
    bounds = bounds.long()
    found = bounds.tolist()
    if found[0] != 0 or found[-1] != q.shape[2] or found != sorted(found):
        raise RegardError(
            f"cu_seqlens must begin with 0, never fall, and end with {q.shape[2]}, the length of q; it is "
            f"{found}."
        )
    return bounds


def as_padded(tensors: Sequence[Tensor], bounds: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return packed tensors [1, H, T, D] as a batch [N, H, longest, D], and its valid positions, bool."""
    lengths = bounds.diff()
    steps = torch.arange(int(lengths.max()), device=bounds.device)
    valid = steps < lengths[:, None]
    index = (bounds[:-1, None] + steps).where(valid, 0)
    made = [x[0][:, index] for x in tensors]  # [H, N, longest, D]
    return [torch.where(valid[:, None, :, None], x.transpose(0, 1), 0) for x in made], valid


def as_packed(padded: Tensor, bounds: Tensor) -> Tensor:
    """Return a batch [N, H, longest, D] as packed, [1, H, T, D]."""
    lengths = bounds.diff()
    valid = torch.arange(padded.shape[2], device=bounds.device) < lengths[:, None]
    return padded.transpose(1, 2)[valid].transpose(0, 1)[None]
