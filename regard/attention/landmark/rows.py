"""Padding: the rows of a batch one by one, without their padding, where it stands before or among tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.attention.mechanism import Context

Work = Callable[[Tensor, Tensor, Tensor], Tensor]


def only_at_end(valid: Tensor | None) -> bool:
    """Whether no padding of bool [B, S] stands before a token."""
    return valid is None or not bool((valid[:, 1:] & ~valid[:, :-1]).any())


def without_padding(work: Work, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """Return what `work` makes of queries, keys and values [1, H, T, D], put back where they stood.

    Padding at the end alone changes no causal row before it, so that the batch goes through at once.
    """
    if only_at_end(ctx.valid_keys):
        return work(q, k, v)
    assert ctx.valid_keys is not None and ctx.valid_queries is not None
    outs = []
    for row in range(q.shape[0]):
        keys, queries = ctx.valid_keys[row], ctx.valid_queries[row]
        one = slice(row, row + 1)
        found = work(q[one, :, queries], k[one, :, keys], v[one, :, keys])
        out = found.new_zeros(1, q.shape[1], q.shape[2], found.shape[-1])
        outs.append(out.index_copy(2, queries.nonzero()[:, 0], found))
    return torch.cat(outs)
