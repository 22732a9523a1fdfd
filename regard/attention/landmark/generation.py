"""Landmarks in generation: put in where a block ends, never sampled, and asked for in what is read."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import RegardError


class InsertLandmarks:
    """A logits processor that lets the landmark follow where a block ends, and nowhere else.

    Args:
        id: of the landmark.
        block: tokens in a block, the landmark included.
        counts: int64 [B], tokens of each prompt, landmarks included and padding not.
        length: of the prompts, padding included.
    """

    def __init__(self, id: int, block: int, counts: Tensor, length: int) -> None:
        self.id, self.block, self.counts, self.length = id, block, counts, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [N, V] of the next token; N is B times the beams or samples of each prompt."""
        counts = self.counts.repeat_interleave(len(input_ids) // max(1, len(self.counts)))
        place = counts + input_ids.shape[1] - self.length
        due = (place.to(scores.device) + 1) % self.block == 0
        scores = scores.clone()
        scores[:, self.id] = -torch.inf
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.id] = 0.0
        return torch.where(due[:, None], forced, scores)


def refuse_misplaced(ids: Tensor, mask: Tensor | None, seen: int, id: int, block: int) -> None:
    """Refuse ids whose landmarks are not where blocks end.

    Args:
        ids: int64 [B, T], new tokens.
        mask: [B, seen + T], 0 at padding; None where there is none, or of another shape.
        seen: tokens before them, padding included.

    Raises:
        RegardError: naming the first place.

    Example:
        >>> refuse_misplaced(torch.tensor([[1, 9, 3, 9]]), None, 0, 9, 2)
    """
    valid = torch.ones(len(ids), seen + ids.shape[1], dtype=torch.bool, device=ids.device)
    if mask is not None and mask.ndim == 2 and mask.shape == valid.shape:
        valid = mask.bool()
    due = valid & (valid.cumsum(-1) % block == 0)
    wrong = (due[:, seen:] != (ids == id)) & valid[:, seen:]
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        what = "no landmark" if due[row, seen + place] else "a landmark"
        raise RegardError(
            f"row {row} has {what} at token {seen + place}, where blocks of {block} tokens "
            f"{'end' if due[row, seen + place] else 'do not end'}; insert() puts landmarks in."
        )
