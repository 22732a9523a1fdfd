"""What a mechanism of attention is: its matrix by definition, a fast path, and steps where it carries state.

What a user configures is a *spec*, a frozen dataclass such as `SlidingWindow(256)`; `build` makes the
module of one layer from it. `tests/laws` holds every registered mechanism to its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.engines.masks import CausalMask, Mask, PaddedMask
from regard.engines.rows import AttentionInputs, expand_heads
from regard.errors import RegardError, ShapeMismatch

State = tuple[Tensor, ...]
LookedAt = Callable[[int, int], Tensor]
LAWS = (
    "matrix", "gradient", "causal", "offset", "step", "absorb", "padding", "grouped", "limit", "precision",
)  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """What a mechanism knows of a call besides q, k and v.

    A mechanism that needs more of a call, such as the layer's input or the shape of a grid, adds a field
    with a default here.

    Attributes:
        mask: which keys each row may see, padding included.
        causal: whether a row may not see keys after it.
        offset: row i stands at key i + `offset`.
        plain: whether `mask` is nothing but this order and padding: no window, no image block.
        valid_queries, valid_keys: bool [B, T] and [B, S], False at padding; None where there is none.
        scale: factor on q k^T, where the mechanism forms it; None for 1 / sqrt(D).
        softcap: c in c * tanh(scores / c), or None.
        bias: added to the scores, broadcastable to [B, H, T, S], or None.
        sink_logits: one logit a head [H], or a head and row [B|1, H, T, 1], that joins a softmax, or None.
        dropout: probability, on the weights of a softmax.
        kept: what the mechanism may keep between the steps of one `generate()`, where there is one; tensors
            with the batch first follow the beams.
    """

    mask: Mask
    causal: bool = True
    offset: int = 0
    plain: bool = True
    valid_queries: Tensor | None = None
    valid_keys: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    sink_logits: Tensor | None = None
    dropout: float = 0.0
    kept: dict[str, Any] | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, *, causal: bool = True, valid: Tensor | None = None) -> Context:
        """Return the context of self-attention over `k`, the last positions of which are those of `q`.

        Args:
            q: [B, H, T, D].
            k: [B, Hkv, S, D]; S >= T where causal.
            valid: bool [B, S], False at padding.

        Raises:
            ShapeMismatch: where q, k and valid do not fit.
        """
        _check_shapes(q, k)
        queries, keys = q.shape[2], k.shape[2]
        offset = keys - queries if causal else 0
        if offset < 0:
            raise ShapeMismatch(f"causal attention of {queries} queries needs as many keys, and has {keys}.")
        mask = CausalMask(queries, keys, offset, q.device) if causal else Mask(queries, keys)
        rows = None
        if valid is not None:
            if valid.shape != (q.shape[0], keys) or valid.dtype != torch.bool:
                raise ShapeMismatch(
                    f"valid must be bool [{q.shape[0]}, {keys}], one for each key, and is "
                    f"{str(valid.dtype).removeprefix('torch.')} {list(valid.shape)}."
                )
            mask = PaddedMask(mask, valid)
            rows = valid[:, offset:] if causal or keys == queries else None
        return cls(mask=mask, causal=causal, offset=offset, valid_queries=rows, valid_keys=valid)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionInputs:
        """Return the same call as the engines take it."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return AttentionInputs(
            q, k, v, self.mask, scale, self.softcap, self.bias, self.sink_logits, self.dropout
        )


def _check_shapes(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ShapeMismatch(
                f"{name} must be floating-point [batch, heads, time, dim], and is {list(x.shape)}."
            )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % max(1, k.shape[1]):
        raise ShapeMismatch(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and dim, and the heads of q be a "
            "multiple of those of k."
        )


class Mechanism(nn.Module):
    """The attention of one layer.

        matrix(q, k, ctx)          [B, H, T, S], the definition, O(T * S)
        forward(q, k, v, ctx)      [B, H, T, Dv], the fast path
        step(q, k, v, state, ctx)  the same for new positions only, and the new state; where it carries one

    q is [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], with H a multiple of Hkv. A state is float32 or
    float64; a padded position neither writes to it nor ages it.

    Attributes:
        carries_state: whether it decodes from a state of its own instead of the cached keys and values.
        honours: which of `mask`, `bias`, `softcap` and `sink_logits` it takes into account, or does without
            because it forms no scores; a call with another is refused. `mask` is any besides causal order
            and padding, which all honour.
        orders: `causal` where a row may see no later key, `full` where it may see all; a call of the other
            kind is refused.
        exempt: laws that it breaks by design, and why; `LAWS` names them.
        decodes_approximately: whether it decodes from a cache although the law `offset` does not hold,
            because it approximates, and otherwise for queries that come together.
    """

    carries_state: ClassVar[bool] = False
    honours: ClassVar[frozenset[str]] = frozenset()
    orders: ClassVar[frozenset[str]] = frozenset({"causal", "full"})
    exempt: ClassVar[dict[str, str]] = {}
    decodes_approximately: ClassVar[bool] = False

    def refuses(self, ctx: Context) -> str | None:
        """Return, in words, what of a call this cannot take into account, or None."""
        if ("causal" if ctx.causal else "full") not in self.orders:
            return "causal order" if ctx.causal else "no causal order"
        found = (
            ("mask", not ctx.plain, "a mask besides causal order and padding, such as a sliding window"),
            ("bias", ctx.bias is not None, "a position bias on its scores"),
            ("softcap", ctx.softcap is not None, "a soft-cap on its scores"),
            ("sink_logits", ctx.sink_logits is not None, "sink logits in its softmax"),
        )
        return next((words for name, there, words in found if there and name not in self.honours), None)

    def context(self, q: Tensor, k: Tensor, ctx: Context | None) -> Context:
        """Return `ctx`, or causal self-attention where it is None.

        Raises:
            RegardError: where it has what this cannot take into account.
        """
        ctx = ctx or Context.of(q, k)
        words = self.refuses(ctx)
        if words is not None:
            raise RegardError(f"{type(self).__name__} was given {words}, which it cannot take into account.")
        return ctx

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        """Return the weight of each key for each row, [B, H, T, S]; rows of padding are arbitrary."""
        raise NotImplementedError

    def reference(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        """Return what `forward` must return, by definition, [B, H, T, Dv].

        A mechanism that is not linear in v, or adds what does not come from v, defines this itself.
        """
        weights = self.matrix(q, k, ctx)
        return weights @ expand_heads(v, q.shape[1]).to(weights.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        """Return head outputs [B, H, T, Dv]; without `ctx`, causal self-attention."""
        raise NotImplementedError

    def looked_at(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> LookedAt | None:
        """Return which keys each row attends to; None, the default, for all that the mask lets it see.

        A mechanism that chooses among the keys (HiP, routing, landmarks) makes its choice here once, as
        `forward` does, and returns a function of a range of rows, `rows(start, stop)`, which gives bool
        [B|1, H|1, stop - start, S]: True for every key that has a weight, whether it was routed or stands in
        a window or among first tokens. The lens `routed` asks a few rows at a time, so no T x S mask need
        ever exist; `regard.engines.blocks.listed_mask` gives one part from lists of key blocks.
        """
        return None

    def auxiliary(self) -> Tensor | None:
        """Return what the last forward in training adds to the loss, weighted; None for nothing.

        It is handed out once a forward. `regard.objectives.train` adds it.
        """
        return None

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of T >= 0 new positions [B, H, T, Dv], and the state after them.

        Args:
            k, v: the new positions only.
            state: what this returned before, tensors with the batch first; None at the beginning.
            ctx: of the new positions only: its mask is T x T.
        """
        raise NotImplementedError

    def absorb(self, k: Tensor, v: Tensor, heads: int, ctx: Context | None = None) -> State:
        """Return the state after positions of which only keys and values are known.

        A mechanism whose state depends on earlier queries as well refuses.

        Args:
            heads: number of query heads.
        """
        queries = k.new_zeros(k.shape[0], heads, k.shape[2], k.shape[3])
        return self.step(queries, k, v, None, ctx)[1]
