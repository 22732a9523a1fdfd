"""Sliding-window attention over [P, x], P learned, that decodes from the last keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.mechanism import State
from regard.attention.positions import Rotary
from regard.attention.titans.parts import attended, check_state, heads_of, merged, newest


class WindowAttention(nn.Module):
    """Softmax over the last `window` positions, a row's own included, and over persistent tokens.

    Args:
        dim: width of x.
        heads: number of heads; dim / heads is even, for rotary positions.
        window: positions that a row sees.
        persistent: number of learned tokens that every row sees, whatever the input.
    """

    def __init__(self, dim: int, heads: int, window: int, persistent: int) -> None:
        super().__init__()
        self.heads, self.window, self.width = heads, window, dim // heads
        self.projections, self.turn = nn.Linear(dim, 3 * dim, bias=False), Rotary()
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None

    def step(self, x: Tensor, state: State | None, filled: Tensor | None = None) -> tuple[Tensor, State]:
        """Return what rows see [B, T, dim], and the state: keys, values [B, H, window, d], positions seen."""
        batch, length, _ = x.shape
        if state is None:
            kept = x.new_zeros(batch, self.heads, self.window, self.width)
            state = (kept, kept, torch.zeros(batch, dtype=torch.int64, device=x.device))
        self.check(state, batch, x.dtype)
        old_k, old_v, seen = state
        q, k, v = self._projected(x, seen[:, None] + torch.arange(length, device=x.device))
        keys, values = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        out = self._attend(q, keys, values, seen) if length else q
        after = (newest(old_k, k, filled, 2), newest(old_v, v, filled, 2))
        return merged(out), (*after, seen + (length if filled is None else filled))

    def shapes(self, batch: int) -> list[list[int]]:
        """Return the shapes of the state's tensors."""
        kept = [batch, self.heads, self.window, self.width]
        return [kept, kept, [batch]]

    def check(self, state: State, batch: int, dtype: torch.dtype) -> None:
        """Refuse a state of another layer, batch or dtype."""
        check_state(state, self.shapes(batch), dtype)

    def reference(self, x: Tensor) -> Tensor:
        """Return the same under a dense mask."""
        length = x.shape[1]
        at = torch.arange(length, device=x.device)
        q, k, v = self._projected(x, at[None])
        apart = at[:, None] - at
        near = (apart >= 0) & (apart < self.window)
        first = self._persistent(x)
        if first is not None:
            k, v = (
                torch.cat([p.expand(len(x), -1, -1, -1), rows], 2)
                for p, rows in zip(first, (k, v), strict=True)
            )
            near = F.pad(near, (k.shape[2] - length, 0), value=True)
        scores = q @ k.mT / self.width**0.5
        return merged(scores.masked_fill(~near, -torch.inf).softmax(-1) @ v)

    def _projected(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_of(part, self.heads) for part in self.projections(x).chunk(3, -1))
        return self.turn(q, at), self.turn(k, at), v

    def _persistent(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the persistent tokens, [1, H, P, d]; they have no position."""
        if self.persistent is None:
            return None
        _, k, v = self.projections(self.persistent[None].to(x.dtype)).chunk(3, -1)
        return heads_of(k, self.heads), heads_of(v, self.heads)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """Attention of blocks of rows, each to the keys that any of its rows sees."""
        batch, _, length, _ = q.shape
        size = min(self.window, length)
        short = -length % size
        reach = self.window + size
        rows = F.pad(q, (0, 0, 0, short)).unflatten(2, (-1, size)).transpose(1, 2)
        near_k, near_v = (
            F.pad(x, (0, 0, 0, short)).unfold(2, reach, size).permute(0, 2, 1, 4, 3) for x in (keys, values)
        )
        blocks = rows.shape[1]
        i, j = (torch.arange(n, device=q.device) for n in (size, reach))
        visible = ((j > i[:, None]) & (j <= i[:, None] + self.window))[None, None]
        if bool((seen < self.window).any()):
            place = torch.arange(blocks, device=q.device)[:, None] * size + j
            there = place >= (self.window - seen.clamp(max=self.window))[:, None, None]
            visible = visible & there[:, :, None]
        visible = visible.expand(batch, blocks, -1, -1)
        first = self._persistent(q)
        if first is not None:
            shape = (batch, blocks, -1, -1, -1)
            near_k, near_v = (
                torch.cat([p[:, None].expand(shape), near], 3)
                for p, near in zip(first, (near_k, near_v), strict=True)
            )
            visible = F.pad(visible, (first[0].shape[2], 0), value=True)
        rows, near_k, near_v = (x.flatten(0, 1) for x in (rows, near_k, near_v))
        out = attended(rows, near_k, near_v, visible.flatten(0, 1)[:, None])
        return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
