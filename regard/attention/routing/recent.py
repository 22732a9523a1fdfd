"""Causal clusters: a token is in its m nearest clusters, and sees the last w members of each up to itself.

    keys(i) = union over the m clusters c nearest to q_i of
              the last w among the j <= i for which c is one of the m clusters nearest to k_j
    out_i   = softmax over j in keys(i) of (scale q_i . k_j), times v_j

A key that two clusters bring counts once. What a token sees depends on nothing after it, so that decoding
from a cache gives what the whole gives. A row that sees no key has output 0.

For each of the m clusters of a row in turn, rows are grouped by cluster and place in it: a tile is `unit`
rows and the w + `unit` - 1 members that they may see, a dense product. Parts are joined by their logsumexps.

Status: our choice, not of the paper: its balanced selection is not causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.attention.layout import Layout
from regard.attention.routing.options import Options
from regard.engines.blocks import attend_blocks, merge_parts


@dataclass(frozen=True, eq=False)
class Members:
    """The keys of each cluster in order of time, and where the clusters of a row end for it.

    Attributes:
        order: int64 [B, H, S m], the keys of cluster 0, of cluster 1 and so on.
        first: int64 [B, H, C + 1], where each cluster begins in `order`.
        own: int64 [B, H, T, m], the clusters of a row.
        ends: int64 [B, H, T, m], how many members of such a cluster stand at the row or before it.
        of_key: int64 [B, H, S, m], the clusters of a key; C at padding.
        place: int64 [B, H, S, m], which member of the cluster it is.
    """

    order: Tensor
    first: Tensor
    own: Tensor
    ends: Tensor
    of_key: Tensor
    place: Tensor

    @classmethod
    def of(cls, own: Tensor, of_key: Tensor, layout: Layout, clusters: int) -> Members:
        """Return who is in which cluster.

        Args:
            own: int64 [B, H, T, m], clusters of compact rows.
            of_key: int64 [B, H, S, m], of compact keys.
        """
        batch, heads, length, m = of_key.shape
        time = torch.arange(length, device=of_key.device)
        real = time < layout.seen[:, None]
        of_key = torch.where(real[:, None, :, None], of_key, clusters)
        codes, where = (of_key * length + time[:, None]).flatten(2).sort(-1)
        order = where // m
        starts = torch.arange(clusters + 1, device=codes.device) * length
        first = torch.searchsorted(codes, starts.expand(batch, heads, -1).contiguous())
        place = torch.empty_like(where).scatter_(
            2, where, torch.arange(length * m, device=codes.device).expand_as(where)
        )
        place = place.view(of_key.shape) - first.gather(2, of_key.flatten(2)).view(of_key.shape)
        at = torch.arange(own.shape[2], device=own.device) + layout.offset[:, None]
        last = (own * length + at[:, None, :, None].clamp(max=length - 1)).flatten(2)
        ends = torch.searchsorted(codes, last, right=True) - first.gather(2, own.flatten(2))
        return cls(order, first, own, ends.view(own.shape), of_key, place)


def attend_recent(
    q: Tensor, k: Tensor, v: Tensor, members: Members, layout: Layout, scale: float, options: Options
) -> Tensor:
    """Return attention to the last members of a row's clusters, [B, H, T, Dv], of compact rows.

    Args:
        q, k, v: [B, H, T, D], [B, H, S, D] and [B, H, S, Dv], compact, in one dtype.
    """
    if not q.shape[2] or not k.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    parts = [_part(q, k, v, members, layout, scale, options, b) for b in range(members.own.shape[3])]
    out, lse = merge_parts(*parts)
    if not options.mask_self:
        return out
    at = layout.offset[:, None] + torch.arange(q.shape[2], device=q.device)
    places = at[:, None, :, None].clamp(max=k.shape[2] - 1).expand(*q.shape[:2], -1, 1)
    of_self = members.of_key.gather(2, places.expand(-1, -1, -1, members.of_key.shape[3]))
    there = (of_self[..., None] == members.own[..., None, :]).flatten(3).any(-1)
    own = v.gather(2, places.expand(-1, -1, -1, v.shape[3]))
    return torch.where((there & (lse == -torch.inf))[..., None], own, out)


def _part(
    q: Tensor, k: Tensor, v: Tensor, members: Members, layout: Layout, scale: float, options: Options, b: int
) -> tuple[Tensor, Tensor]:
    """Attention of each row to its b-th cluster, without keys of the clusters before; and its logsumexp."""
    window = options.cluster_size
    rows, index, places = _tiles(members, layout, window, b)
    ends = _of_rows(members.ends, rows)
    mine = ends[..., b][..., None]
    places = places[..., None, :]
    visible = (places < mine) & (places >= mine - window)
    keys = index.clamp_min(0)
    of_key, place = (_of_rows(x, keys) for x in (members.of_key, members.place))
    own = _of_rows(members.own, rows)
    for before in range(b):
        for a in range(of_key.shape[4]):
            same = of_key[..., None, :, a] == own[..., before][..., None]
            visible &= ~(same & (place[..., None, :, a] >= ends[..., before][..., None] - window))
    if options.mask_self:
        at = rows + layout.offset.view(-1, 1, 1, 1)
        visible &= index[..., None, :] != at[..., None]
    out, lse = attend_blocks(q, k, v, index, rows=rows, visible=visible, scale=scale)
    return _back(out, rows, q.shape[2], 0.0), _back(lse[..., None], rows, q.shape[2], -torch.inf)[..., 0]


def _tiles(members: Members, layout: Layout, window: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the same stretch of the same cluster, and the members they may see.

    Returns:
        rows: int64 [B, H, Q, unit], -1 for none.
        index: int64 [B, H, Q, window + unit - 1], keys, -1 for none.
        places: the same shape, which member of its cluster each is.
    """
    own, ends, first = members.own[..., b], members.ends[..., b], members.first
    batch, heads, length = own.shape
    unit = max(8, min(64, window // 2))
    stretches = members.of_key.shape[2] // unit + 1
    group = own * stretches + (ends - 1).clamp_min(0) // unit
    group, row = group.sort(dim=-1, stable=True)
    at = torch.arange(length, device=own.device)
    new = torch.ones_like(group, dtype=torch.bool)
    new[..., 1:] = group[..., 1:] != group[..., :-1]
    inside = at - torch.where(new, at, 0).cummax(-1).values
    tile = (inside % unit == 0).cumsum(-1) - 1
    count = int(tile.max()) + 1
    rows = row.new_full((batch, heads, count * unit), -1)
    real = row < layout.rows.view(-1, 1, 1)
    rows.scatter_(2, tile * unit + inside % unit, torch.where(real, row, -1))
    of_tile = row.new_zeros(batch, heads, count).scatter_(2, tile, group)
    cluster, stretch = of_tile // stretches, of_tile % stretches
    places = torch.arange(1 - window, unit, device=own.device) + (stretch * unit)[..., None]
    begin = first.gather(2, cluster)[..., None]
    size = first.gather(2, cluster + 1)[..., None] - begin
    there = (places >= 0) & (places < size)
    found = (begin + places).clamp(0, members.order.shape[2] - 1).flatten(2)
    index = torch.where(there, members.order.gather(2, found).view(places.shape), -1)
    return rows.view(batch, heads, count, unit), index, places


def _of_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, H, Q, R] of x [B, H, N, m], as [B, H, Q, R, m]."""
    places = rows.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, places).view(*rows.shape, x.shape[3])


def _back(x: Tensor, rows: Tensor, length: int, empty: float) -> Tensor:
    """[B, H, Q, R, D] as [B, H, T, D], each row being in one tile at most; `empty` where it is in none."""
    places = torch.where(rows < 0, length, rows).flatten(2)[..., None].expand(-1, -1, -1, x.shape[4])
    whole = x.new_full((*x.shape[:2], length + 1, x.shape[4]), empty)
    return whole.scatter(2, places, x.flatten(2, 3))[:, :, :length]


def seen_by_last(own: Tensor, of_key: Tensor, window: int) -> Tensor:
    """Return which keys the last position sees, bool [B, H, S].

    Args:
        own: int64 [B, H, m], its clusters.
        of_key: int64 [B, H, S, m], those of the keys up to it; a number of no cluster at padding.
    """
    seen = torch.zeros(of_key.shape[:3], dtype=torch.bool, device=of_key.device)
    for b in range(own.shape[2]):
        inside = (of_key == own[..., b, None, None]).any(-1)
        later = inside.flip(-1).cumsum(-1).flip(-1)
        seen |= inside & (later <= window)
    return seen


def listed_last(seen: Tensor, at: Tensor, mask_self: bool) -> Tensor:
    """Return the keys that the last position sees, int64 [B, H, n], -1 for none.

    Args:
        seen: bool [B, H, S], as `seen_by_last` gives it.
        at: int64 [B|1], which key it is itself.
        mask_self: whether it sees itself only where it sees nothing else.
    """
    time = torch.arange(seen.shape[2], device=seen.device)
    if mask_self:
        other = seen & (time != at[:, None, None])
        seen = torch.where(other.any(-1, keepdim=True), other, seen)
    most = max(1, int(seen.sum(-1).max()))
    listed = torch.where(seen, time, len(time)).topk(most, -1, largest=False).values
    return torch.where(listed < len(time), listed, -1)


def attend_listed(q: Tensor, k: Tensor, v: Tensor, listed: Tensor, scale: float) -> Tensor:
    """Return attention of one row to keys that were fetched for it, [B, H, 1, Dv].

    Args:
        q, k, v: [B, H, 1, D], [B, H, n, D] and [B, H, n, Dv].
        listed: int64 [B, H, n], -1 where a key is none.
    """
    every = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=q.device)
    visible = (listed >= 0)[:, :, None, None]
    return attend_blocks(q, k, v, every, key_block=k.shape[2], visible=visible, scale=scale)[0]
