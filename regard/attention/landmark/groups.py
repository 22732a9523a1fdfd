"""The grouped softmax by definition, for landmarks that stand anywhere.

    blk(j)     = number of landmarks strictly before j, so that a landmark belongs to the block it closes
    cur        = blk(i), the block of the row itself
    A          = visible tokens of block cur that are no landmarks, and the landmarks of all earlier blocks
    a          = softmax of the scores over A
    w          = softmax of the scores over the tokens of one earlier block that are no landmarks
    weight(j)  = a_j in block cur;  a_landmark(b) w_j in block b < cur;  0 of a landmark

A row sees no landmark of its own block, itself included. A block of nothing but its landmark has nothing to
gate and gets no share, where the official code loses it; else the two agree.

Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.1. Status: agrees with the official code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ShapeMismatch


def block_numbers(is_landmark: Tensor) -> Tensor:
    """Return how many landmarks stand strictly before each token, int64 of the same shape.

    Example:
        >>> block_numbers(torch.tensor([False, True, False, False, True])).tolist()
        [0, 0, 1, 1, 1]
    """
    return is_landmark.cumsum(-1) - is_landmark.long()


def grouped_softmax(scores: Tensor, is_landmark: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of a grouped softmax, and the gate of each earlier block.

    Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.1.

    Args:
        scores: [B, H, T, S]; row i stands at key S - T + i.
        is_landmark: bool [B, S].
        visible: bool, broadcastable to [B, H, T, S]; later keys are hidden whatever it says.

    Returns:
        weights [B, H, T, S], which sum to 1 in every row that sees a token of its own block, and gates
        [B, H, T, N], N the number of blocks that are closed: the weight of each as a whole, 0 where the row
        cannot read it.

    Raises:
        ShapeMismatch: where the shapes do not fit.

    Example:
        >>> marks = torch.tensor([[False, True, False]])
        >>> everywhere = torch.ones(3, 3, dtype=torch.bool)
        >>> weights, gates = grouped_softmax(torch.zeros(1, 1, 3, 3), marks, everywhere)
        >>> weights[0, 0].tolist(), gates[0, 0].tolist()
        ([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]], [[0.0], [0.0], [0.5]])
    """
    rows, keys = scores.shape[-2:]
    if scores.ndim != 4 or is_landmark.shape != (scores.shape[0], keys) or rows > keys:
        raise ShapeMismatch(
            f"scores must be [B, H, T, S] with T <= S and is_landmark bool [B, S]; they are "
            f"{list(scores.shape)} and {list(is_landmark.shape)}."
        )
    block = block_numbers(is_landmark)  # [B, S]
    count = int(is_landmark.sum(-1).max()) if is_landmark.numel() else 0
    at = torch.arange(keys, device=scores.device)
    visible = visible & (at <= at[keys - rows :, None])
    own = block[:, None, keys - rows :, None]  # [B, 1, T, 1]
    of = block[:, None, None, :]
    marks = is_landmark[:, None, None, :]
    current = visible & ~marks & (of == own)
    closed = visible & (of < own)
    index = of.expand(scores.shape)
    within = scores.masked_fill(~(closed & ~marks), -torch.inf)
    logs = _log_sums(within, index, count + 1)  # [B, H, T, N + 1]
    gates = torch.full_like(logs, -torch.inf).scatter_reduce(
        -1, index, scores.masked_fill(~(closed & marks), -torch.inf), "amax"
    )
    shift = torch.where(logs.isfinite(), gates - logs, 0.0)
    past = within + shift.gather(-1, index)
    merged = torch.where(current, scores, past)
    some = merged.isfinite().any(-1, keepdim=True)
    weights = torch.where(some, merged, 0.0).softmax(-1) * some
    held = torch.zeros_like(logs).scatter_add(-1, index, weights * closed)
    return weights, held[..., :count]


def _log_sums(scores: Tensor, index: Tensor, count: int) -> Tensor:
    """The log of the sum of exponentials of each group of the last axis, -inf where a group is empty."""
    top = scores.new_full((*scores.shape[:-1], count), -torch.inf)
    top = top.scatter_reduce(-1, index, scores.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0.0)
    sums = torch.zeros_like(top).scatter_add(-1, index, (scores - top.gather(-1, index)).exp())
    return torch.where(sums > 0, sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + top, -torch.inf)
