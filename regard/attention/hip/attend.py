"""Attention to the window, the first tokens, and the key blocks that a search has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.layout import Layout, rows_of
from regard.engines.block_tiles import Visible
from regard.engines.blocks import attend_blocks, merge_parts

if TYPE_CHECKING:
    from regard.attention.hip.spec import HiP

ROWS, TILE = 64, 16
NONE = 2**62


def attend_found(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: Layout, spec: HiP, scale: float
) -> Tensor:
    """Return softmax attention [B, H, T, Dv] of compact rows.

    Args:
        q, k, v: compact, as `Layout` makes them.
        chosen: key blocks of each query block, int64 [B, H, Q, n], as `search` returns them.
    """
    if not layout.causal:
        return _everywhere(q, k, v, chosen, layout, spec, scale)
    parts = [_near(q, k, v, layout, spec, scale)]
    first = torch.arange(spec.sink // spec.key_block, device=q.device)
    first = first[: -(-k.shape[2] // spec.key_block)].expand(*chosen.shape[:3], -1)
    listed = torch.cat([first, chosen], -1)
    if listed.shape[3]:
        parts.append(_far(q, k, v, listed, _first_full(chosen), layout, spec, scale))
    return merge_parts(*parts)[0]


def _first_full(chosen: Tensor) -> int:
    """From which query block on every list of chosen blocks [B, H, Q, n] is full."""
    if not chosen.shape[3]:
        return chosen.shape[2]
    short = (chosen[..., -1] < 0).any(1).any(0).nonzero()
    return int(short[-1]) + 1 if len(short) else 0


def _far(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor, full: int, layout: Layout, spec: HiP, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to listed blocks [B, H, Q, n], ascending, before the window.

    Only the last tokens of a span are in some row's window: from query block `full` on, what is listed before
    them is seen by all rows.
    """
    size = spec.query_block
    clear = max(0, listed.shape[3] - (min(size, q.shape[2]) - 1) // spec.key_block - 2)
    found = []
    for start, stop, sure in ((0, full, 0), (full, listed.shape[2], clear)):
        if stop > start:
            found.append(
                attend_blocks(
                    q[:, :, start * size : stop * size], k, v, listed[:, :, start:stop],
                    key_block=spec.key_block, query_block=size, scale=scale, clear=sure,
                    visible=_before_window(layout, spec, start * size),
                )
            )  # fmt: skip
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def _before_window(layout: Layout, spec: HiP, start: int) -> Visible:
    """Which keys come before the windows of rows that are counted from row `start`."""
    before = layout.offset[:, None, None, None, None] + start - spec.window
    return lambda rows, keys: keys <= rows + before


def _everywhere(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: Layout, spec: HiP, scale: float
) -> Tensor:
    seen = layout.seen[:, None, None, None, None]
    return attend_blocks(
        q, k, v, chosen, key_block=spec.key_block, query_block=spec.query_block, scale=scale,
        visible=lambda rows, keys: keys < seen,
    )[0]  # fmt: skip


def _near(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: HiP, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the window: blocks of rows against the few tiles of keys that it covers."""
    size = min(ROWS, q.shape[2])
    blocks = -(-q.shape[2] // size)
    first = torch.arange(blocks, device=q.device) * size + layout.offset[:, None] - spec.window + 1
    count = min(-(-k.shape[2] // TILE), (spec.window + size - 2) // TILE + 2)
    tiles = first.clamp(min=0)[..., None] // TILE + torch.arange(count, device=q.device)
    tiles = torch.where(tiles * TILE < k.shape[2], tiles, -1)[:, None]
    offset = layout.offset[:, None, None, None, None]

    def visible(rows: Tensor, keys: Tensor) -> Tensor:
        apart = rows + offset - keys
        return (apart >= 0) & (apart < spec.window)

    return attend_blocks(
        q, k, v, tiles, key_block=TILE, query_block=size, visible=visible, scale=scale
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Far:
    """What one query reads besides its window: tokens int64 [B, H, N], keys [B, H, N, D], values likewise."""

    tokens: Tensor
    keys: Tensor
    values: Tensor


def fetch(chosen: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: HiP) -> Far:
    """Return the first tokens and those of chosen blocks [B, H, 1, n], with their keys and values."""
    tokens = _far_tokens(chosen, spec)
    at = tokens.clamp(max=layout.keys - 1)
    if layout.key_at is not None:
        at = layout.key_at[:, None].expand(-1, at.shape[1], -1).gather(2, at)
    keys, values = (_rows_at(x, at) for x in (k, v))
    return Far(tokens, keys, values)


def attend_one(q: Tensor, k: Tensor, v: Tensor, far: Far, layout: Layout, spec: HiP, scale: float) -> Tensor:
    """Return softmax attention [B, H, 1, Dv] of one row, to keys as the call has them.

    Nothing is touched but what it reads.
    """
    batch, heads, _, width = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    hidden = far.tokens >= (layout.seen - spec.window)[:, None, None]  # from where the window begins
    q = q * scale
    scores = (far.keys @ q.transpose(2, 3)).squeeze(3).masked_fill(hidden, -torch.inf)  # [B, H, N]
    near_keys, near_values, near_hidden = _window(k, v, layout, spec)
    near = (q.view(batch, kv_heads, group, width) @ near_keys.transpose(2, 3)).view(batch, heads, -1)
    near = near if near_hidden is None else near + near_hidden.to(near.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.cat([scores, near], -1).to(wide).softmax(-1).to(v.dtype)
    far_weights, near_weights = weights.split([scores.shape[2], near.shape[2]], -1)
    out = near_weights.view(batch, kv_heads, group, -1) @ near_values
    return out.view(batch, heads, 1, -1) + far_weights[:, :, None] @ far.values


def _far_tokens(chosen: Tensor, spec: HiP) -> Tensor:
    """First tokens and those of chosen blocks, int64 [B, H, N]; `NONE` for none."""
    inside = torch.arange(spec.key_block, device=chosen.device)
    tokens = (chosen.squeeze(2)[..., None] * spec.key_block + inside).flatten(2)
    first = torch.arange(spec.sink, device=chosen.device).expand(*tokens.shape[:2], -1)
    return torch.cat([first, torch.where(tokens < 0, NONE, tokens)], -1)


def _rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows of x [B, Hkv, S, D] at [B, H, N], for each query head, [B, H, N, D]."""
    flat, first = rows_of(x)
    return F.embedding(at + first.repeat_interleave(at.shape[1] // x.shape[1], 1)[..., None], flat)


def _window(k: Tensor, v: Tensor, layout: Layout, spec: HiP) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the window, and what of it is hidden, 0 or -inf [B, 1, w]."""
    if layout.key_at is None:
        first = max(0, layout.keys - spec.window)
        return k[:, :, first : layout.keys], v[:, :, first : layout.keys], None
    places = layout.seen[:, None] - 1 - torch.arange(spec.window, device=k.device)
    at = layout.key_at.gather(1, places.clamp(min=0))[:, None, :, None]
    keys, values = (x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    hidden = torch.zeros(places.shape, device=k.device).masked_fill_(places < 0, -torch.inf)
    return keys, values, hidden[:, None]
