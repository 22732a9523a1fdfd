"""Attention to the window, the first tokens, and the key blocks that a search has found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.layout import Layout
from regard.engines.blocks import attend_blocks, merge_parts

if TYPE_CHECKING:
    from regard.attention.hip.spec import HiP

ROWS, TILE = 64, 16


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
        before = layout.offset[:, None, None, None, None] - spec.window
        far = attend_blocks(
            q, k, v, listed, key_block=spec.key_block, query_block=spec.query_block, scale=scale,
            visible=lambda rows, keys: keys <= rows + before,
        )  # fmt: skip
        parts.append(far)
    return merge_parts(*parts)[0]


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


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: Layout, spec: HiP, scale: float
) -> Tensor:
    """Return softmax attention [B, H, 1, Dv] of one row, to keys as the call has them.

    What it reads is fetched, and nothing else is touched.
    """
    batch, heads, _, width = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    before = layout.seen - spec.window  # [B|1], where the window begins
    far = _far_tokens(chosen, before, spec)  # [B, H, N]
    far_keys, far_values = (_fetched(x, far, layout, group) for x in (k, v))
    hidden = torch.zeros(far.shape, dtype=q.dtype, device=q.device).masked_fill_(far < 0, -torch.inf)
    scores = (far_keys @ (q * scale).transpose(2, 3)).squeeze(3) + hidden  # [B, H, N]
    near_keys, near_values, near_hidden = _window(k, v, layout, spec)
    grouped = (q * scale).view(batch, kv_heads, group, width)
    near = (grouped @ near_keys.transpose(2, 3)).view(batch, heads, -1)
    near = near if near_hidden is None else near + near_hidden.to(near.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.cat([scores, near], -1).to(wide).softmax(-1).to(v.dtype)
    far_weights, near_weights = weights.split([scores.shape[2], near.shape[2]], -1)
    out = near_weights.view(batch, kv_heads, group, -1) @ near_values
    return out.view(batch, heads, 1, -1) + far_weights[:, :, None] @ far_values


def _far_tokens(chosen: Tensor, before: Tensor, spec: HiP) -> Tensor:
    """First tokens and those of chosen blocks that come before the window, [B, H, N]; -1 for none."""
    inside = torch.arange(spec.key_block, device=chosen.device)
    tokens = (chosen.squeeze(2)[..., None] * spec.key_block + inside).flatten(2)
    first = torch.arange(spec.sink, device=chosen.device).expand(*tokens.shape[:2], -1)
    tokens = torch.cat([first, tokens], -1)
    return torch.where(tokens < before[:, None, None], tokens, -1)


def _fetched(x: Tensor, tokens: Tensor, layout: Layout, group: int) -> Tensor:
    """Rows of x [B, Hkv, S, D] for each query head, [B, H, N, D]."""
    at = tokens.clamp(min=0)
    if layout.key_at is not None:
        at = layout.key_at[:, None].expand(-1, at.shape[1], -1).gather(2, at)
    batch, heads, _ = at.shape
    head = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) // group
    return F.embedding(at + head * x.shape[2], x.reshape(-1, x.shape[3]))


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
