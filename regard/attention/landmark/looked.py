"""Which keys landmark attention over a memory attends to, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.landmark.store import Sizes
from regard.attention.mechanism import Context, LookedAt


def looked_at(chosen: Tensor, sizes: Sizes, keys: int, ctx: Context) -> LookedAt:
    """Return a function of a range of rows: bool [B, H, rows, S], none in rows of padding.

    A row reads its own section up to itself, and the blocks that were chosen; landmarks have no weight.

    Args:
        chosen: int64 [B, H, T, k], the closed blocks that each row reads, by number without padding; -1 is
            none.
        keys: S, keys of the call.
    """
    device = chosen.device
    key = torch.arange(keys, device=device)[None]
    real = torch.ones_like(key, dtype=torch.bool)
    if ctx.valid_keys is not None:
        real = ctx.valid_keys
        key = (real.cumsum(-1) - 1).clamp_min(0)
    of_rows = slice(keys - chosen.shape[2], keys)
    token = real & (key % sizes.block != sizes.block - 1)
    blocks = -(-keys // sizes.block)

    def rows(start: int, stop: int) -> Tensor:
        some = chosen[:, :, start:stop]
        at, there = (x[:, of_rows][:, start:stop, None] for x in (key, real))
        listed = torch.zeros(*some.shape[:3], blocks + 1, dtype=torch.bool, device=device)
        listed.scatter_(3, torch.where(some < 0, blocks, some), True)
        of_key = (key // sizes.block)[:, None, None].expand(some.shape[0], *some.shape[1:3], -1)
        near = (key[:, None] >= at // sizes.local * sizes.local) & (key[:, None] <= at)
        seen = listed.gather(3, of_key) | near[:, None]
        return seen & (token[:, None] & there)[:, None]

    return rows
