"""Attention biases: a learned key, and value, beside those of the text, for a head to park its attention on.

    A = softmax over [scale * q_i . k*, scale * q_i . k_1, ..., scale * q_i . k_i]
    out_i = A_i* v* + sum_j A_ij v_j

    key        k* is learned, v* is 0
    key-value  both are learned
    value      nothing joins the softmax: out_i = sum_j A_ij v_j + v*

The key has no position: it is added after rotary embedding, and every row may see it. With a learned key the
sink emerges there and no longer on the first token; a learned value alone does not help.

Source: Gu et al., 2024, arXiv 2410.10781, on attention biases. Status: agrees with the official code
(sail-sg/Attention-Sink, `lit_gpt/model_kv_bias.py`). It reads the model's ordinary cache, in which the key
takes no place. The matrix leaves its column out, so that rows sum to less than 1: the rest is the key's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.checks import refuse_nan
from regard.attention.matrices import dense_mask, score_matrix, softmax_matrix
from regard.attention.mechanism import Context, Mechanism
from regard.attention.registry import Spec, mechanism
from regard.attention.widths import head_count, key_width, value_width
from regard.engines.masks import LedMask
from regard.engines.rows import attend, expand_heads
from regard.errors import RegardError, ShapeMismatch

KINDS, STD = ("key", "key-value", "value"), 0.02


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    causal: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Return softmax attention with one more key that every row sees, or a value added to every row.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        key: [H, D], or [1, D] for all heads.
        value: [H, Dv] or [1, Dv]; of the key, zero where left out. Without a key it is added to the output.
        causal: whether a row sees no later key of k.
        valid: bool [B, S], False at padding.

    Returns:
        [B, H, T, Dv], in the dtype of v.

    Raises:
        ShapeMismatch: where they do not fit together.
        RegardError: where neither key nor value is given.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> biased_attention(q, k, v, key=torch.zeros(1, 8)).shape
        torch.Size([1, 2, 5, 8])
    """
    if key is None and value is None:
        raise RegardError("biased_attention needs a key, a value or both.")
    refuse_nan(q=q, k=k, v=v, key=key, value=value)
    return _attend(q, k, v, key, value, Context.of(q, k, causal=causal, valid=valid))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, value: Tensor | None, ctx: Context
) -> Tensor:
    _check(q, v, key, value)
    if key is None:
        assert value is not None
        return (attend(ctx.inputs(q, k, v)) + value[:, None]).to(v.dtype)
    value = key.new_zeros(1, v.shape[3]) if value is None else value
    if len(key) > 1 or len(value) > 1:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    keys, values = (
        torch.cat([extra.to(x)[:, None].expand(len(x), x.shape[1], 1, -1), x], 2)
        for extra, x in ((key, k), (value, v))
    )
    if _triangular(ctx, q, k):
        rows = F.pad(q, (0, 0, 1, 0))  # a row for the key itself, so that order stays causal; then dropped
        return attend(replace(Context.of(rows, keys), **_kept(ctx)).inputs(rows, keys, values))[:, :, 1:]
    bias = ctx.bias if ctx.bias is None else F.pad(ctx.bias[..., : k.shape[2]], (1, 0))
    led = replace(ctx, mask=LedMask(ctx.mask, 1, q.device), bias=bias)
    return attend(led.inputs(q, keys, values))


def _triangular(ctx: Context, q: Tensor, k: Tensor) -> bool:
    """Whether a call is nothing but causal order over as many keys as queries."""
    open_ = ctx.plain and ctx.causal and ctx.valid_keys is None and ctx.bias is None
    return open_ and ctx.offset == 0 and q.shape[2] == k.shape[2]


def _kept(ctx: Context) -> dict[str, Any]:
    return {name: getattr(ctx, name) for name in ("scale", "softcap", "dropout")}


def _check(q: Tensor, v: Tensor, key: Tensor | None, value: Tensor | None) -> None:
    for name, x, width in (("key", key, q.shape[3]), ("value", value, v.shape[3])):
        if x is not None and x.shape not in ((q.shape[1], width), (1, width)):
            raise ShapeMismatch(
                f"the {name} must be [{q.shape[1]}, {width}], one a query head, or [1, {width}], and is "
                f"{list(x.shape)}."
            )


class KeyValueBiasAttention(Mechanism):
    """Softmax attention with a learned key, value or both; the module of `KeyValueBias`.

    Attributes:
        key: [H or 1, D], or None.
        value: [H or 1, Dv], or None.
    """

    honours = frozenset({"mask", "bias", "softcap"})

    def __init__(self, heads: int, width: int | None, value_width: int | None) -> None:
        super().__init__()
        self.key = None if width is None else nn.Parameter(STD * torch.randn(heads, width))
        self.value = None if value_width is None else nn.Parameter(STD * torch.randn(heads, value_width))

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        mask = dense_mask(ctx, q.device)
        if self.key is None:
            return softmax_matrix(q, k, ctx, mask)
        scores = score_matrix(q, k, ctx, mask)
        own = q.to(scores.dtype) @ self.key.to(scores.dtype)[..., None] * ctx.inputs(q, k, k).scale
        own = own if ctx.softcap is None else ctx.softcap * torch.tanh(own / ctx.softcap)
        return torch.cat([own, scores], -1).softmax(-1)[..., 1:]

    def reference(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        weights = self.matrix(q, k, ctx)
        out = weights @ expand_heads(v, q.shape[1]).to(weights.dtype)
        if self.value is None:
            return out
        taken = 1.0 if self.key is None else 1 - weights.sum(-1, keepdim=True)
        return out + taken * self.value[:, None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        return _attend(q, k, v, self.key, self.value, self.context(q, k, ctx))


@mechanism("key-value-bias")
@dataclass(frozen=True, kw_only=True)
class KeyValueBias(Spec):
    """Softmax attention with a learned key, value or both beside those of the text.

    Attributes:
        kind: "key", "key-value" or "value", see above.
        heads: number of query heads, one bias each; in a pretrained model the layer's.
        width: of a head's keys; in a pretrained model the layer's.
        value_width: of a head's values; default `width`, in a pretrained model the layer's.
        shared: one bias for all heads.

    Example:
        >>> layer = KeyValueBias(kind="key", heads=4, width=16).build()
        >>> layer.key.shape, layer.value
        (torch.Size([4, 16]), None)
    """

    module: ClassVar = KeyValueBiasAttention
    kind: str = "key"
    heads: int | None = None
    width: int | None = None
    value_width: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RegardError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")

    def build(self, site: Any = None) -> KeyValueBiasAttention:
        heads = 1 if self.shared else head_count(self, self.heads, site)
        given = self.width if self.value_width is None else self.value_width
        return KeyValueBiasAttention(
            heads,
            key_width(self, self.width, site) if self.kind != "value" else None,
            value_width(self, given, site) if self.kind != "key" else None,
        )

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        each = [cls(kind=kind, heads=4, width=8, value_width=6) for kind in KINDS]
        return *each, cls(kind="key-value", shared=True, width=8, value_width=6)
