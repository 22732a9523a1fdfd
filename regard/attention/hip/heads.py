"""HiP attention as a mechanism: search, then attention to what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from regard.attention.hip.attend import Far, attend_found, attend_one, fetch
from regard.attention.hip.looked import looked_at
from regard.attention.hip.reference import seen_by_definition
from regard.attention.hip.search import everything, search, spans_of
from regard.attention.layout import Layout
from regard.attention.matrices import softmax_matrix
from regard.attention.mechanism import Context, LookedAt, Mechanism

if TYPE_CHECKING:
    from regard.attention.hip.spec import HiP

FETCHED = ("tokens", "far keys", "far values")


class HiPAttention(Mechanism):
    """Softmax attention to window, first tokens and what a tree search has found; the module of `HiP`."""

    orders = frozenset({"causal"})
    exempt: ClassVar[dict[str, str]] = {
        "causal": "what is found is shared by a block of queries, of which the later ones have a say",
        "offset": "the blocks of queries begin at the first query of a call",
    }
    decodes_approximately = True

    def __init__(self, spec: HiP) -> None:
        super().__init__()
        self.spec = spec

    def refuses(self, ctx: Context) -> str | None:
        words = super().refuses(ctx)
        if words is None and ctx.dropout and self.training:
            return "dropout on its weights"
        if words == "no causal order":
            return f"{words} (which takes window=0 and sink=0)"
        return f"{words} (which takes a window)" if words == "causal order" else words

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        with torch.no_grad():
            seen = seen_by_definition(q, k, ctx, self.spec)
        return softmax_matrix(q, k, ctx, seen)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
        scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        chosen = self.chosen(q, k, ctx, layout)
        return hip_rows(q, k, v, chosen, layout, self.spec, scale, ctx.kept)

    @torch.no_grad()
    def looked_at(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> LookedAt:
        ctx = self.context(q, k, ctx)
        layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
        return looked_at(self.chosen(q, k, ctx, layout), layout, self.spec, k.shape[2])

    def chosen(self, q: Tensor, k: Tensor, ctx: Context, layout: Layout | None = None) -> Tensor:
        """Return the key blocks of each query block, int64 [B, H, Q, n]; in decoding, of a few steps ago.

        Args:
            ctx: of the call; what was found is kept in `ctx.kept` for `spec.refresh` steps.
        """
        layout = layout or Layout.of(ctx, q.shape[2], k.shape[2], q.device)
        kept = ctx.kept if q.shape[2] == 1 and layout.causal and self.spec.refresh > 1 else None
        if kept is not None:
            found = self._still_good(kept, q, layout)
            if found is not None:
                return found
        elif ctx.kept:
            ctx.kept.clear()  # several tokens may have replaced some that were fetched
        chosen = search(layout.compact_rows(q), k, layout, self.spec)
        if kept is not None:
            kept.clear()
            kept.update(chosen=chosen, keys=layout.keys)
        return chosen

    def _still_good(self, kept: dict[str, Any], q: Tensor, layout: Layout) -> Tensor | None:
        """What was found up to `refresh` - 1 steps ago; None where there is none, or it was all there was."""
        chosen = kept.get("chosen")
        if chosen is None or chosen.shape[:2] != q.shape[:2] or chosen.device != q.device:
            return None
        searched = chosen.shape[3] == -(-self.spec.k // self.spec.key_block)
        recent = 0 <= layout.keys - kept["keys"] < self.spec.refresh
        if not searched or not recent:
            return None
        return chosen if layout.key_at is None else everything(chosen, spans_of(layout, self.spec), self.spec)

    def extra_repr(self) -> str:
        return repr(self.spec)


class HiPByRow(HiPAttention):
    """HiP attention in which every query has a search of its own; the module where `query_block` is 1."""

    exempt: ClassVar[dict[str, str]] = {}


class HiPBothWays(HiPAttention):
    """HiP attention of every query to keys on both sides; the module where `window` is 0."""

    orders = frozenset({"full"})


def module_of(spec: HiP) -> HiPAttention:
    """Return the module of one layer."""
    if spec.window == 0:
        return HiPBothWays(spec)
    return HiPByRow(spec) if spec.query_block == 1 else HiPAttention(spec)


def hip_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    layout: Layout,
    spec: HiP,
    scale: float,
    kept: dict[str, Any] | None = None,
) -> Tensor:
    """Return HiP attention [B, H, T, Dv] to given key blocks; zeros at padding.

    Args:
        kept: what lasts from one decoded token to the next.
    """
    if q.shape[2] == 0 or layout.keys == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if q.shape[2] == 1 and layout.causal:
        far = _far(chosen, k, v, layout, spec, {} if kept is None else kept)
        return layout.placed(attend_one(layout.compact_rows(q), k, v, far, layout, spec, scale))
    compact = layout.compact_rows(q), layout.compact_keys(k), layout.compact_keys(v)
    return layout.placed(attend_found(*compact, chosen, layout, spec, scale))


def _far(chosen: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: HiP, kept: dict[str, Any]) -> Far:
    """What chosen blocks hold; where a search serves several tokens, it is fetched once."""
    if chosen is not kept.get("chosen") or torch.is_grad_enabled():
        return fetch(chosen, k, v, layout, spec)
    if FETCHED[0] not in kept:
        far = fetch(chosen, k, v, layout, spec)
        kept.update(zip(FETCHED, (far.tokens, far.keys, far.values), strict=True))
    return Far(*(kept[name] for name in FETCHED))
