"""Where the real queries and keys of a call stand, and the call without its padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.mechanism import Context


@dataclass(frozen=True, eq=False)
class Layout:
    """Real queries and keys of each sequence, numbered from 0.

    Query i of a sequence stands at its key i + `offset`, and sees that key and those before it, or all keys
    where not `causal`.

    Attributes:
        queries, keys: T and S, the numbers of the longest sequence.
        offset: int64 [B|1].
        rows, seen: int64 [B|1], how many real queries and keys a sequence has.
        row_at, key_at: int64 [B, T] and [B, S], where they stand in the call; real ones first. None where
            nothing is padding.
    """

    causal: bool
    queries: int
    keys: int
    offset: Tensor
    rows: Tensor
    seen: Tensor
    row_at: Tensor | None = None
    key_at: Tensor | None = None

    @classmethod
    def of(cls, ctx: Context, queries: int, keys: int, device: torch.device) -> Layout:
        """Return the layout of a call of `queries` rows; where causal, without the keys after the last."""
        keys = min(keys, ctx.offset + queries) if ctx.causal else keys
        if ctx.valid_keys is None and ctx.valid_queries is None:
            offset, rows, seen = (torch.tensor([n], device=device) for n in (keys - queries, queries, keys))
            return cls(ctx.causal, queries, keys, offset, rows, seen)
        valid_keys, valid_rows = ctx.valid_keys, ctx.valid_queries
        if valid_keys is None:
            assert valid_rows is not None
            valid_keys = torch.ones(len(valid_rows), keys, dtype=torch.bool, device=device)
        valid_keys = valid_keys[:, :keys].to(device)
        if valid_rows is None:
            valid_rows = torch.ones(len(valid_keys), queries, dtype=torch.bool, device=device)
        valid_rows = valid_rows.to(device)
        rows, seen = valid_rows.sum(-1), valid_keys.sum(-1)
        row_at, key_at = (
            torch.argsort((~valid).to(torch.int8), dim=-1, stable=True) for valid in (valid_rows, valid_keys)
        )
        return cls(ctx.causal, queries, keys, seen - rows, rows, seen, row_at, key_at)

    def compact_rows(self, x: Tensor) -> Tensor:
        """Return [B, H, T, D] with the real queries first."""
        return x if self.row_at is None else _taken(x, self.row_at)

    def compact_keys(self, x: Tensor) -> Tensor:
        """Return [B, Hkv, S, D] with the real keys first."""
        return x[:, :, : self.keys] if self.key_at is None else _taken(x, self.key_at)

    def placed(self, out: Tensor) -> Tensor:
        """Return [B, H, T, Dv] of compact rows where the call has them; zeros at padding."""
        if self.row_at is None:
            return out
        real = torch.arange(self.queries, device=out.device) < self.rows[:, None]
        out = out.masked_fill(~real[:, None, :, None], 0)
        index = self.row_at[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
        return torch.zeros_like(out).scatter(2, index, out)

    def ends(self, query_block: int) -> Tensor:
        """Return how many keys the last row of each query block sees, int64 [B|1, Q]; 0 of an empty block."""
        blocks = -(-self.queries // query_block)
        first = torch.arange(blocks, device=self.rows.device) * query_block
        last = (first + query_block).clamp(max=self.queries)
        last = torch.minimum(last, self.rows[:, None])
        ends = last + self.offset[:, None] if self.causal else self.seen[:, None].expand(-1, blocks)
        return torch.where(first < self.rows[:, None], ends, 0)


def rows_of(x: Tensor, per: int = 1) -> tuple[Tensor, Tensor]:
    """Return the rows of x [B, H, S, D] as a matrix [N, per D], and where each head begins, int64 [B, H].

    Nothing is copied where heads are whole rows apart, as in a part of a cache with room for more.

    Args:
        per: consecutive positions that make a row; in the last of a head some may belong to no position.
    """
    batch, heads, length, width = x.shape
    if (x.requires_grad and torch.is_grad_enabled()) or not lies_in_rows(x, per):
        x = F.pad(x, (0, 0, 0, -length % per)).contiguous()
        length = x.shape[2]
    width *= per
    far, next_head = x.stride()[0] // width, x.stride()[1] // width
    count = (batch - 1) * far + (heads - 1) * next_head + length // per if x.numel() else 0
    first = torch.arange(batch, device=x.device)[:, None] * far
    return x.as_strided((count, width), (width, 1)), first + torch.arange(heads, device=x.device) * next_head


def lies_in_rows(x: Tensor, per: int = 1) -> bool:
    """Whether `rows_of` need not copy."""
    width, (far, next_head, next_row, one) = x.shape[3], x.stride()
    apart = not far % (per * width) and not next_head % (per * width)
    return apart and next_row == width and one == 1 and not x.shape[2] % per


def _taken(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
