"""Which keys HiP attends to, a few rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.layout import Layout
from regard.attention.mechanism import LookedAt

if TYPE_CHECKING:
    from regard.attention.hip.spec import HiP


def looked_at(chosen: Tensor, layout: Layout, spec: HiP, keys: int) -> LookedAt:
    """Return a function of a range of rows: bool [B, H, rows, S], none in rows of padding.

    Args:
        chosen: key blocks of each query block, int64 [B, H, Q, n], of compact rows.
        keys: S, keys of the call.
    """

    def rows(start: int, stop: int) -> Tensor:
        at, real = _places(layout, start, stop)
        seen = _seen(chosen, layout, spec, at) & real[:, None, :, None]
        if layout.key_at is not None:
            columns = layout.key_at[:, None, None].expand_as(seen)
            seen = torch.zeros_like(seen).scatter_(3, columns, seen)
        return F.pad(seen, (0, keys - layout.keys))

    return rows


def _places(layout: Layout, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The compact rows that stand at `start:stop` of the call, int64 [B|1, rows], and which are real."""
    at = torch.arange(layout.queries, device=layout.rows.device)[None]
    if layout.row_at is not None:
        at = torch.empty_like(layout.row_at).scatter_(1, layout.row_at, at.expand_as(layout.row_at))
    at = at[:, start:stop]
    return at, at < layout.rows[:, None]


def _seen(chosen: Tensor, layout: Layout, spec: HiP, at: Tensor) -> Tensor:
    """Which compact keys compact rows see, bool [B, H, rows, keys]."""
    batch, heads, _, listed = chosen.shape
    block = (at // spec.query_block)[:, None, :, None].expand(batch, heads, -1, listed)
    own = chosen.gather(2, block)
    blocks = -(-layout.keys // spec.key_block)
    found = torch.zeros(*own.shape[:3], blocks + 1, dtype=torch.bool, device=own.device)
    found.scatter_(3, torch.where(own < 0, blocks, own), True)
    found = found[..., :blocks].repeat_interleave(spec.key_block, 3)[..., : layout.keys]
    j = torch.arange(layout.keys, device=own.device)
    if not layout.causal:
        return found & (j < layout.seen[:, None, None, None])
    last = (at + layout.offset[:, None])[:, None, :, None]
    before = j <= last - spec.window
    return ((found | (j < spec.sink)) & before) | ((j <= last) & ~before)
