"""Local heads: a block of queries sees its own block of keys and the one before; without order also the next.

    row i sees the j with  floor(i / w) - 1 <= floor(j / w) <= floor(i / w) + 1,  where causal j <= i

Source: Roy et al., 2020, arXiv 2003.05997, section 3. Status: agrees with the official code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.layout import Layout
from regard.engines.blocks import attend_blocks


def attend_local(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int, scale: float) -> Tensor:
    """Return attention to near blocks of `window` keys, [B, H, T, Dv], of compact rows.

    Args:
        q: [B, H, T, D].
        k, v: [B, Hkv, S, D] and [B, Hkv, S, Dv]; H is a multiple of Hkv.
    """
    length, keys = q.shape[2], k.shape[2]
    if not length or not keys:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    window = min(window, keys)
    offset, device = layout.offset[:, None], q.device
    if length == 1:
        rows = torch.zeros_like(offset)[..., None]
        block = offset // window
    else:
        first, last = int(offset.min()) // window, (int(offset.max()) + length - 1) // window
        block = torch.arange(first, last + 1, device=device).expand(len(offset), -1)
        rows = block[..., None] * window + torch.arange(window, device=device) - offset[..., None]
        rows = torch.where((rows >= 0) & (rows < layout.rows.view(-1, 1, 1)), rows, -1)
    near = torch.tensor([-1, 0] if layout.causal else [-1, 0, 1], device=device)
    index = block[..., None] + near
    index = torch.where((index >= 0) & (index <= (keys - 1) // window), index, -1)
    seen = layout.seen.view(-1, 1, 1, 1, 1)
    shift = layout.offset.view(-1, 1, 1, 1, 1)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        return (j < seen) & (j <= i + shift) if layout.causal else (j < seen) & (i == i)

    rows, index = rows[:, None], index[:, None]
    out, _ = attend_blocks(q, k, v, index, key_block=window, rows=rows, visible=visible, scale=scale)
    places = torch.where(rows < 0, length, rows).flatten(2).expand(*q.shape[:2], -1)[..., None]
    whole = out.new_zeros(*q.shape[:2], length + 1, v.shape[3])
    return whole.scatter(2, places.expand(-1, -1, -1, v.shape[3]), out.flatten(2, 3))[:, :, :length]


def local_mask(
    queries: int, keys: int, offset: int, window: int, causal: bool, device: torch.device
) -> Tensor:
    """Return which keys rows see, bool [T, S]."""
    i = torch.arange(queries, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)
    apart = i // window - j // window
    return (apart >= 0) & (apart <= 1) & (j <= i) if causal else apart.abs() <= 1
