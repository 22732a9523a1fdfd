"""How many keys each row of a call may see."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.mechanism import Context
from regard.engines.masks import unhidden
from regard.errors import RegardError

ROWS = 128


def visible_keys(ctx: Context, q: Tensor, k: Tensor) -> Tensor:
    """Return the number of keys that each row may see, int64 [B|1, H|1, T]; 0 where it sees none.

    Padding, order, windows and where the rows stand among the keys are taken into account.

    Args:
        ctx: of the call.
        q, k: [B, H, T, D] and [B, Hkv, S, D].

    Raises:
        RegardError: where an additive mask holds more than 0 and -inf, so that it is a bias.
    """
    rows, keys = q.shape[2], k.shape[2]
    if ctx.plain:
        valid = ctx.valid_keys
        if valid is None:
            valid = torch.ones(1, keys, dtype=torch.bool, device=q.device)
        before = torch.cat([valid.new_zeros(len(valid), 1, dtype=torch.long), valid.cumsum(-1)], 1)
        at = torch.full((rows,), keys, device=q.device)
        if ctx.causal:
            at = (torch.arange(1, rows + 1, device=q.device) + ctx.offset).clamp(0, keys)
        return before[:, at][:, None]
    parts = [_counted(ctx, start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]
    shape = torch.broadcast_shapes(*(part.shape[:2] for part in parts)) if parts else (1, 1)
    return torch.cat([part.expand(*shape, -1).to(q.device) for part in parts], 2)


def _counted(ctx: Context, start: int, stop: int) -> Tensor:
    first, last = ctx.mask.bounds(start, stop)
    mask = ctx.mask.rows(start, stop, first, last)
    if mask is None:
        return torch.full((1, 1, stop - start), last - first)
    seen = unhidden(mask)
    if mask.dtype != torch.bool and bool(mask[seen].any()):
        value = float(mask[seen][mask[seen] != 0][0])
        raise RegardError(
            f"the mask adds {value:g} to a score; softplus attention takes 0 and -inf alone, for a bias such "
            "as ALiBi's has another meaning there."
        )
    return seen.sum(-1).expand(-1, -1, stop - start)
