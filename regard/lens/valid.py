"""Which positions of a stack's hidden states are real tokens, and how many came before."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.lens.matches import TOKEN_KINDS_NOT
from regard.runtime.call import CACHED
from regard.runtime.run import Run


def tokens_before(run: Run, kind: str, sequences: int) -> Tensor:
    """Return how many real tokens of each sequence were in the cache already, int64 [B]."""
    seen = (run.seen or 0) if kind in CACHED else 0
    valid = None if run.valid is None else run.valid[:, :seen]
    if valid is None or valid.shape != (sequences, seen):
        return torch.full((sequences,), seen)
    return valid.sum(1)


def valid_positions(run: Run, kind: str, length: int) -> Tensor | None:
    """Return which positions of a stack's present forward are real, bool [B, length], or None for all."""
    if kind in TOKEN_KINDS_NOT:
        return None
    if kind == "encoder" and run.encoder_ids is not None:
        mask = run.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.shape[1:] == (length,) else None
    return run.valid_rows(length)
