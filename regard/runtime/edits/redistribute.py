"""Move attention from some keys to others, row by row, keeping the sum of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch


def redistribute(
    weights: Tensor,
    from_mask: Tensor,
    to_mask: Tensor | None,
    fraction: float | Tensor,
    row_gate: Tensor | None = None,
) -> Tensor:
    """Take a fraction of the weight on some keys and hand it to others, in proportion to what those have.

        moved_i = fraction * sum_{j in from} w_ij
        w'_ij   = (1 - fraction) w_ij                        j in from
        w'_ij   = w_ij + moved_i w_ij / sum_{k in to} w_ik   j in to

    The step shared by Kang et al., 2025, arXiv 2503.03321, section 4 (from visual sinks to other image
    tokens) and Yu et al., 2024, arXiv 2406.15765 (from sinks to all other tokens). The sum of a row
    stays. A row that has no weight on the receiving keys is left as it was; a key in both masks gives
    and does not receive.

    Args:
        weights: [..., R, K], such as [B, H, R, K].
        from_mask: bool, broadcastable to `weights`: keys that give.
        to_mask: bool, broadcastable to `weights`: keys that receive; None for all that do not give.
        fraction: 0 to 1, or a tensor broadcastable to [..., R, 1]. It is the part moved, not kept.
        row_gate: bool or 0 to 1, broadcastable to [..., R]: rows in which to do it; default all.

    Returns:
        New weights, of the same shape and dtype; gradients flow to `weights` and `fraction`.

    Example:
        >>> w = torch.tensor([[0.6, 0.1, 0.3]])
        >>> sinks = torch.tensor([True, False, False])
        >>> redistribute(w, sinks, ~sinks, 0.5)
        tensor([[0.3000, 0.1750, 0.5250]])
    """
    if isinstance(fraction, int | float) and not 0 <= fraction <= 1:
        raise RegardError(f"fraction is {fraction}; it must lie between 0 and 1, and is the part moved.")
    for name, mask in (("from_mask", from_mask), ("to_mask", to_mask)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise RegardError(f"{name} has dtype {mask.dtype}; it must be bool.")
        _fits(name, mask, weights.shape)
    others = ~from_mask if to_mask is None else to_mask & ~from_mask
    given = torch.where(from_mask, weights, 0.0).sum(-1, keepdim=True)
    held = torch.where(others, weights, 0.0).sum(-1, keepdim=True)
    part = torch.as_tensor(fraction, device=weights.device, dtype=weights.dtype)
    _fits("fraction", part, (*weights.shape[:-1], 1))
    if row_gate is not None:
        _fits("row_gate", row_gate, weights.shape[:-1])
        part = part * row_gate.to(weights.dtype)[..., None]
    part = torch.where(held > 0, part, 0.0)
    more = 1 + part * given / torch.where(held > 0, held, 1.0)
    kept = torch.where(from_mask, 1 - part, more if to_mask is None else torch.where(others, more, 1.0))
    return weights * kept


def _fits(name: str, x: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    sizes = zip(reversed(x.shape), reversed(shape), strict=False)
    if x.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ShapeMismatch(f"{name} has shape {tuple(x.shape)}, which does not broadcast to {tuple(shape)}.")
