"""Which keys routed heads look at, a few rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.attention.layout import Layout
from regard.attention.mechanism import Context, LookedAt
from regard.attention.routing.balanced import members
from regard.attention.routing.clusters import normalized
from regard.attention.routing.recent import Members
from regard.engines.rows import expand_heads

if TYPE_CHECKING:
    from regard.attention.routing.heads import RoutingHeads


@torch.no_grad()
def looked_at(heads: RoutingHeads, q: Tensor, k: Tensor, ctx: Context) -> LookedAt:
    """Return a function of a range of rows that gives which keys they see, bool [B, H, rows, S]."""
    layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
    parts = [] if heads.clusters is None else [_routed(heads, q, k, layout)]
    if heads.routed < heads.heads:
        parts.append(_local(heads, q, k, layout))
    queries, keys = q.shape[2], k.shape[2]

    def rows(start: int, stop: int) -> Tensor:
        at, real = _places(layout, start, stop, queries, len(q), q.device)
        seen = torch.cat([part(at) for part in parts], 1) & real[:, None, :, None]
        if layout.key_at is None:
            return torch.nn.functional.pad(seen, (0, keys - seen.shape[3]))
        columns = layout.key_at[:, None, None].expand(-1, seen.shape[1], seen.shape[2], -1)
        seen = seen & (torch.arange(seen.shape[3], device=q.device) < layout.seen[:, None])[:, None, None]
        return seen.new_zeros(*seen.shape[:3], keys).scatter_(3, columns, seen)

    return rows


def _places(
    layout: Layout, start: int, stop: int, queries: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The compact rows that stand at `start:stop`, int64 [B, rows], and which of those are real."""
    at = torch.arange(queries, device=device).expand(batch, -1)
    if layout.row_at is not None:
        at = torch.empty_like(layout.row_at).scatter_(1, layout.row_at, at)
    at = at[:, start:stop]
    return at, at < layout.rows[:, None]


def _routed(heads: RoutingHeads, q: Tensor, k: Tensor, layout: Layout):  # type: ignore[no-untyped-def]
    clusters, options = heads.clusters, heads.options
    assert clusters is not None
    x = normalized(layout.compact_rows(q)[:, : heads.routed], options.norm)
    y = normalized(expand_heads(layout.compact_keys(k), heads.heads)[:, : heads.routed], options.norm)
    time = torch.arange(y.shape[2], device=y.device)

    def order(at: Tensor) -> Tensor:
        own = (at + layout.offset[:, None])[:, None, :, None]
        return time <= own if layout.causal else torch.ones_like(own, dtype=torch.bool)

    if heads.balanced:
        of_rows, of_keys = (
            _member(members(clusters.affinity(z), options.cluster_size, count), z.shape[2])
            for z, count in ((x, layout.rows), (y, layout.seen))
        )

        def balanced(at: Tensor) -> Tensor:
            mine = of_rows.gather(3, at[:, None, None].expand(-1, heads.routed, options.clusters, -1))
            return (mine.transpose(2, 3) @ of_keys > 0) & order(at)

        return balanced
    found = Members.of(
        clusters.nearest(x, options.nearest), clusters.nearest(y, options.nearest), layout, options.clusters
    )

    def recent(at: Tensor) -> Tensor:
        places = at[:, None, :, None].expand(-1, heads.routed, -1, found.own.shape[3])
        own, ends = found.own.gather(2, places)[..., None, :], found.ends.gather(2, places)[..., None, :]
        seen = torch.zeros(
            *at.shape[:1], heads.routed, at.shape[1], len(time), dtype=torch.bool, device=at.device
        )
        for a in range(found.of_key.shape[3]):
            place = found.place[:, :, None, :, a, None]
            same = found.of_key[:, :, None, :, a, None] == own
            seen |= (same & (place < ends) & (place >= ends - options.cluster_size)).any(-1)
        return seen

    return recent


def _member(listed: Tensor, length: int) -> Tensor:
    """1 where a token is in a cluster, float [B, H, C, N], of the lists [B, H, C, n]."""
    found = torch.zeros(*listed.shape[:3], length + 1, device=listed.device)
    return found.scatter_(3, torch.where(listed < 0, length, listed), 1.0)[..., :length]


def _local(heads: RoutingHeads, q: Tensor, k: Tensor, layout: Layout):  # type: ignore[no-untyped-def]
    j = torch.arange(layout.keys, device=q.device)
    window = heads.window

    def near(at: Tensor) -> Tensor:
        i = (at + (layout.offset[:, None] if layout.causal else 0))[..., None]
        apart = i // window - j // window
        seen = (apart >= 0) & (apart <= 1) & (j <= i) if layout.causal else apart.abs() <= 1
        return seen[:, None].expand(-1, heads.heads - heads.routed, -1, -1)

    return near
