"""Bi-level routing attention of a sequence, as a mechanism that stands in the place of softmax attention.

The tokens are cut into segments of one length, and segments are the regions; the last may be shorter, or
empty and never chosen. It needs all tokens at once, so it stands for attention without causal order alone
(encoders). Padding is left out before a sequence is cut; a short one has a segment for each token.

Source: Zhu et al., 2023, arXiv 2303.08810, which has it on maps. Status: our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.attention.biformer.function import masks_of
from regard.attention.biformer.regions import Regions, check_topk, counts_of
from regard.attention.biformer.route import RegionRouting, attend_routed, route, weights_by_definition
from regard.attention.costs import Costs
from regard.attention.mechanism import Context, LookedAt, Mechanism
from regard.attention.registry import Spec, get, mechanism
from regard.engines.rows import expand_heads
from regard.errors import ShapeMismatch


class BiLevelRoutingHeads(Mechanism):
    """Attention of the segments of a sequence to those they choose; the module of `BiLevelRouting`."""

    orders = frozenset({"full"})

    def __init__(self, segments: int = 8, topk: int = 2) -> None:
        super().__init__()
        self.segments, self.topk = segments, topk

    def refuses(self, ctx: Context) -> str | None:
        words = super().refuses(ctx)
        return "dropout on its weights" if words is None and ctx.dropout else words

    def context(self, q: Tensor, k: Tensor, ctx: Context | None) -> Context:
        ctx = super().context(q, k, Context.of(q, k, causal=False) if ctx is None else ctx)
        if q.shape[2] != k.shape[2]:
            raise ShapeMismatch(
                f"segments choose among those of one sequence, and there are {q.shape[2]} queries and "
                f"{k.shape[2]} keys."
            )
        return ctx

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = torch.zeros(*q.shape[:3], k.shape[2], dtype=kind, device=q.device)
        for items, at in self._alike(q, ctx):
            parts = self._cut(q, k, items, at)
            weights = weights_by_definition(
                parts.q, parts.k, parts.routing, self._scale(q, ctx), parts.visible
            )
            n = len(at)
            found = found.index_put(
                (
                    items[:, None, None, None],
                    torch.arange(q.shape[1], device=q.device)[:, None, None],
                    at[:, None],
                    at,
                ),
                weights[..., :n, :n],
            )
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        for items, at in self._alike(q, ctx):
            parts = self._cut(q, k, items, at)
            values = parts.plan.split(_of(expand_heads(v, q.shape[1]), items, at))
            mixed = attend_routed(
                parts.q, parts.k, values, parts.routing.index, self._scale(q, ctx), parts.visible
            )
            mixed = parts.plan.joined(mixed).transpose(1, 2)
            if len(items) == q.shape[0] and len(at) == q.shape[2]:
                return mixed
            out = out.index_put(_cells(items, q, at), mixed)
        return out

    def looked_at(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> LookedAt | None:
        ctx = self.context(q, k, ctx)
        calls = [(items, at, self._cut(q, k, items, at)) for items, at in self._alike(q, ctx)]

        def rows(start: int, stop: int) -> Tensor:
            found = torch.zeros(q.shape[0], 1, stop - start, k.shape[2], dtype=torch.bool, device=q.device)
            for items, at, parts in calls:
                chosen, size = parts.routing.chosen(), parts.plan.tokens
                mine = ((at >= start) & (at < stop)).nonzero()[:, 0]
                seen = chosen[:, mine // size].repeat_interleave(size, 2)[..., : len(at)]
                found[items[:, None, None], 0, at[mine][:, None] - start, at] = seen
            return found

        return rows

    def _scale(self, q: Tensor, ctx: Context) -> float:
        return q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale

    @staticmethod
    def _alike(q: Tensor, ctx: Context) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield items of the batch that are padded alike, and where their tokens are."""
        every = torch.arange(q.shape[0], device=q.device)
        if not q.shape[0] or not q.shape[2]:
            return
        if ctx.valid_keys is None:
            yield every, torch.arange(q.shape[2], device=q.device)
            return
        kinds, kind_of = ctx.valid_keys.unique(dim=0, return_inverse=True)
        for kind, valid in enumerate(kinds):
            if valid.any():
                yield every[kind_of == kind], valid.nonzero()[:, 0]

    def _cut(self, q: Tensor, k: Tensor, items: Tensor, at: Tensor) -> _Cut:
        plan = Regions((len(at),), (min(self.segments, len(at)),))
        q, k = (plan.split(_of(x, items, at)) for x in (q, expand_heads(k, q.shape[1])))
        real, visible = masks_of(plan, None, True, q.device)
        return _Cut(plan, q, k, route(q, k, plan, min(self.topk, plan.count), real), visible)


@dataclass(frozen=True, eq=False)
class _Cut:
    """q and k [B, R, T, H, D] of some items, who looks where, and keys that may be seen."""

    plan: Regions
    q: Tensor
    k: Tensor
    routing: RegionRouting
    visible: Tensor | None


def _of(x: Tensor, items: Tensor, at: Tensor) -> Tensor:
    """Some items and positions of [B, H, T, D], as [B', T', H, D]."""
    whole = len(items) == x.shape[0] and len(at) == x.shape[2]
    return (x if whole else x[items][:, :, at]).transpose(1, 2)


def _cells(items: Tensor, q: Tensor, at: Tensor) -> tuple[Tensor, ...]:
    return items[:, None, None], torch.arange(q.shape[1], device=q.device)[:, None], at


@mechanism("bi-level-routing")
@dataclass(frozen=True)
class BiLevelRouting(Spec):
    """Softmax attention of each segment of a sequence to the `topk` segments that fit it best.

    Attributes:
        segments: into how many a sequence is cut.
        topk: how many of them each attends to.

    Example:
        >>> BiLevelRouting(16, topk=4).to_dict()
        {'mechanism': 'bi-level-routing', 'segments': 16, 'topk': 4}
    """

    module: ClassVar = BiLevelRoutingHeads
    costs: ClassVar = Costs(time="T k T/S D", memory="T D")
    segments: int = 8
    topk: int = 2

    def __post_init__(self) -> None:
        check_topk(self.topk, counts_of(self.segments, 1)[0])

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(), cls(5, topk=3)

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec]:
        return cls(max(1, length // 2), max(1, length // 2)), get("softmax")
