"""Routing as a mechanism: cluster heads first, then local heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.attention.layout import Layout
from regard.attention.mechanism import Context, LookedAt, Mechanism
from regard.attention.routing.balanced import attend_balanced, members, warn_of_coverage
from regard.attention.routing.clusters import Clusters, normalized
from regard.attention.routing.local import attend_local, local_mask
from regard.attention.routing.options import Options
from regard.attention.routing.recent import (
    Members,
    attend_listed,
    attend_recent,
    listed_last,
    seen_by_last,
)
from regard.attention.routing.reference import routed_weights
from regard.engines.rows import expand_heads
from regard.errors import RegardError, ShapeMismatch


class RoutingHeads(Mechanism):
    """Attention inside clusters of like tokens, beside local heads; the module of `Routing`.

    Args:
        options: of the cluster heads.
        heads: H, of which the last `local_heads` are local.
        local_heads: how many; 0 to H.
        width: D.
        window: of local heads.
        decay, start: of the centroids, as `Clusters` takes them.
        commitment: factor of the commitment loss in `auxiliary`.

    Attributes:
        clusters: centroids [H - local_heads, C, D]; None where all heads are local.
        commitment: the commitment loss of the last forward in training, until `commitment_loss` takes it.
    """

    orders = frozenset({"causal"})
    balanced: ClassVar[bool] = False

    def __init__(
        self,
        options: Options,
        heads: int,
        local_heads: int,
        width: int,
        window: int,
        *,
        decay: float = 0.999,
        start: str = "noise",
        commitment: float = 1e-4,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.options, self.heads, self.width, self.window = options, heads, width, window
        self.routed = heads - local_heads
        self.clusters: Clusters | None = None
        if self.routed:
            self.clusters = Clusters(
                self.routed, options.clusters, width,
                norm=options.norm, decay=decay, start=start, device=device,
            )  # fmt: skip
        self.factor = commitment
        self.commitment: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no commitment loss: it belongs to the forward of the original."""
        return {**self.__dict__, "commitment": None}

    def auxiliary(self) -> Tensor | None:
        loss, self.commitment = self.commitment, None
        return None if loss is None else self.factor * loss

    def refuses(self, ctx: Context) -> str | None:
        words = super().refuses(ctx)
        if words is None and ctx.dropout and self.training:
            return "dropout on its weights"
        if words is None and self.balanced and ctx.causal and ctx.offset and self.routed:
            return "keys of a cache, of whose queries its balanced clusters know nothing (selection='topw')"
        if words == "no causal order":
            return f"{words} (which takes selection='topw')"
        return words

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self._checked(q, k, ctx)
        layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
        k = expand_heads(k, self.heads)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        whole = q.new_zeros(*q.shape[:3], k.shape[2], dtype=wide)
        for b in range(len(q)):
            rows, keys = _real(layout, b, q.shape[2])
            for h in range(self.heads):
                weights = self._weights(q[b, h, rows], k[b, h, keys], ctx, len(keys) - len(rows), h)
                whole = whole.index_put((torch.tensor(b), torch.tensor(h), rows[:, None], keys), weights)
        return whole

    def _weights(self, q: Tensor, k: Tensor, ctx: Context, offset: int, head: int) -> Tensor:
        """Weights of one head and sequence without padding, [T, S]."""
        offset = offset if ctx.causal else 0
        if self.clusters is not None and head < self.routed:
            scale = self.options.factor(q.shape[1], ctx.scale)
            given = self.clusters.centroids[head], self.options, scale
            return routed_weights(q, k, *given, causal=ctx.causal, offset=offset)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        mask = local_mask(len(q), len(k), offset, self.window, ctx.causal, q.device)
        scores = q.to(wide) @ k.to(wide).T * (q.shape[1] ** -0.5 if ctx.scale is None else ctx.scale)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self._checked(q, k, ctx)
        layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
        rows, keys, values = layout.compact_rows(q), layout.compact_keys(k), layout.compact_keys(v)
        outs = []
        if self.clusters is not None and self._decodes(q, layout):
            outs.append(self._last(rows[:, : self.routed], keys, values, k, ctx, layout))
        elif self.clusters is not None:
            some = [expand_heads(x, self.heads)[:, : self.routed] for x in (rows, keys, values)]
            outs.append(self._routed(some[0], some[1], some[2], k, ctx, layout))
        if self.routed < self.heads:
            near, of_near = self._local(keys, values)
            scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
            outs.append(attend_local(rows[:, self.routed :], near, of_near, layout, self.window, scale))
        return layout.placed(torch.cat([x.to(v.dtype) for x in outs], 1))

    def _local(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the local heads, in groups where the cluster heads are whole groups."""
        group = self.heads // k.shape[1]
        if self.routed % group:
            return expand_heads(k, self.heads)[:, self.routed :], expand_heads(v, self.heads)[
                :, self.routed :
            ]
        return k[:, self.routed // group :], v[:, self.routed // group :]

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor, ctx: Context, layout: Layout) -> Tensor:
        """Cluster heads [B, routed, T, Dv] of compact rows; `given` are the keys as they came."""
        clusters, options = self.clusters, self.options
        assert clusters is not None
        x, y = normalized(q, options.norm), normalized(k, options.norm)
        self._learn(x, y, layout)
        v = v.to(x.dtype)
        a, b = (x, y) if options.norm == "layernorm" else (q.to(x.dtype), k.to(x.dtype))
        scale = options.factor(q.shape[3], ctx.scale)
        if self.balanced:
            warn_of_coverage(options, int(layout.seen.max()) if layout.seen.numel() else 0)
            rows, keys = self._balanced(x, y, layout)
            return attend_balanced(a, b, v, rows, keys, layout, scale, options)
        own, of_key = clusters.nearest(x, options.nearest), self._of_keys(y, given, ctx, layout)
        found = Members.of(own, of_key, layout, options.clusters)
        return attend_recent(a, b, v, found, layout, scale, options)

    def _decodes(self, q: Tensor, layout: Layout) -> bool:
        """Whether one row is asked for and nothing is learned, so that few keys have to be touched."""
        return q.shape[2] == 1 and layout.keys > 0 and not self.balanced and not self.training

    def _last(self, q: Tensor, k: Tensor, v: Tensor, given: Tensor, ctx: Context, layout: Layout) -> Tensor:
        """Cluster heads of one row [B, routed, 1, Dv]: only the keys that it sees are fetched."""
        clusters, options, group = self.clusters, self.options, self.heads // k.shape[1]
        assert clusters is not None
        clusters.settle()
        x = normalized(q, options.norm)
        own, of_key = clusters.nearest(x, options.nearest)[:, :, 0], self._of_keys(None, given, ctx, layout)
        if layout.key_at is not None:
            real = _before(layout.seen, k)
            of_key = torch.where(real[:, None, :, None], of_key, options.clusters)
        seen = seen_by_last(own, of_key, options.cluster_size)
        listed = listed_last(seen, layout.offset, options.mask_self)
        batch = torch.arange(len(q), device=q.device)[:, None, None]
        head = torch.arange(self.routed, device=q.device)[None, :, None] // group
        k, v = (z[batch, head, listed.clamp_min(0)].to(x.dtype) for z in (k, v))
        a, b = (x, normalized(k, options.norm)) if options.norm == "layernorm" else (q.to(x.dtype), k)
        return attend_listed(a, b, v, listed, options.factor(q.shape[3], ctx.scale))

    def _balanced(self, x: Tensor, y: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The queries and keys of each cluster, of normalised ones."""
        assert self.clusters is not None
        size = self.options.cluster_size
        rows = members(self.clusters.affinity(x), size, layout.rows)
        return rows, members(self.clusters.affinity(y), size, layout.seen)

    def _of_keys(self, y: Tensor | None, k: Tensor, ctx: Context, layout: Layout) -> Tensor:
        """The clusters of compact keys [B, routed, S, m]; in decoding those of earlier keys are kept.

        Args:
            y: the compact keys, normalised, where they are at hand.
            k: the keys as they came.
        """
        assert self.clusters is not None
        if ctx.kept is None:
            if y is not None:
                return self.clusters.nearest(y, self.options.nearest)
            return layout.compact_keys(self.assign(k))
        earlier, known = ctx.offset, ctx.kept.get("clusters")
        k = k[:, :, : earlier + ctx.mask.queries]
        if known is None or known.shape[:2] != (len(k), self.routed) or known.shape[2] < earlier:
            known = self.assign(k)
        else:
            known = torch.cat([known[:, :, :earlier], self.assign(k[:, :, earlier:])], 2)
        ctx.kept["clusters"] = known
        return layout.compact_keys(known)

    def assign(self, k: Tensor) -> Tensor:
        """Return the clusters of keys [B, Hkv, S, D], nearest first, int64 [B, H - local_heads, S, m]."""
        assert self.clusters is not None
        y = normalized(expand_heads(k.detach(), self.heads)[:, : self.routed], self.options.norm)
        return self.clusters.nearest(y, self.options.nearest)

    def _learn(self, x: Tensor, y: Tensor, layout: Layout) -> None:
        """Move the centroids by what was seen before and, in training, take note of x and y.

        Checkpointing runs a forward again inside of the backward pass, which must find what the first found.
        """
        clusters = self.clusters
        assert clusters is not None
        again = torch._C._current_graph_task_id() != -1
        if not again:
            clusters.settle()
        if not self.training or not x.shape[2] or not y.shape[2]:
            return
        valid = [
            None if layout.row_at is None else _before(n, z) for n, z in ((layout.rows, x), (layout.seen, y))
        ]
        if not again and not bool(clusters.started):
            clusters.begin(*_joined(x, y, *valid))
        loss = clusters.commitment(x, valid[0]) + clusters.commitment(y, valid[1])
        if not again:
            self.commitment = loss
            clusters.observe(x.detach(), valid[0])
            clusters.observe(y.detach(), valid[1])

    def looked_at(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> LookedAt | None:
        from regard.attention.routing.looked import looked_at

        return looked_at(self, q, k, self._checked(q, k, ctx))

    def _checked(self, q: Tensor, k: Tensor, ctx: Context | None) -> Context:
        ctx = self.context(q, k, ctx)
        if q.shape[1] != self.heads or q.shape[3] != self.width:
            raise ShapeMismatch(
                f"q is {list(q.shape)}; routing was built for {self.heads} heads of width {self.width}."
            )
        if not ctx.causal and self.routed < self.heads and q.shape[2] != k.shape[2]:
            raise RegardError(
                f"there are {q.shape[2]} queries and {k.shape[2]} keys of another sequence, in which "
                "nothing is near; give local_heads=0."
            )
        return ctx

    def extra_repr(self) -> str:
        return f"{self.options!r}, local_heads={self.heads - self.routed}, window={self.window}"


class BalancedHeads(RoutingHeads):
    """Attention inside balanced clusters, beside local heads; the module of `BalancedRouting`."""

    orders = frozenset({"causal", "full"})
    balanced = True
    exempt: ClassVar[dict[str, str]] = {
        "causal": "each cluster takes the tokens most like it, and a later token can push an earlier one out",
        "offset": "which queries a cluster takes depends on all of them",
    }


def _real(layout: Layout, item: int, queries: int) -> tuple[Tensor, Tensor]:
    """Where the real queries and keys of a sequence stand."""
    if layout.row_at is None or layout.key_at is None:
        device = layout.rows.device
        return torch.arange(queries, device=device), torch.arange(layout.keys, device=device)
    return layout.row_at[item, : layout.rows[item]], layout.key_at[item, : layout.seen[item]]


def _before(count: Tensor, x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], device=x.device) < count[:, None]


def _joined(
    x: Tensor, y: Tensor, valid_x: Tensor | None, valid_y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    both = torch.cat([x.detach(), y.detach()], 2)
    return both, None if valid_x is None or valid_y is None else torch.cat([valid_x, valid_y], 1)
