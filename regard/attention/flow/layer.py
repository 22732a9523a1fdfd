"""Flow-Attention with projections, in the manner of `torch.nn.MultiheadAttention`.

    out = dropout(W_o flow(W_q query, W_k key, W_v value))        over heads of width embed_dim / num_heads

It takes self- and cross-attention, padding and causal order, and decodes. Across, what leaves a source counts
every target: in a decoder that reads an encoder so, later targets move earlier outputs.

Source: Wu et al., 2022, arXiv 2202.06258; dropout after the projection is that of the official module.
Status: agrees with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.checks import check_padding
from regard.attention.flow.spec import FlowAttention
from regard.attention.mechanism import Context, State
from regard.engines.masks import order_and_padding, unhidden
from regard.errors import RegardError, ShapeMismatch


class FlowMultiheadAttention(nn.Module):
    """Flow-Attention that stands where a `torch.nn.MultiheadAttention` does.

    Args:
        embed_dim: width of queries and of the output.
        num_heads: number of heads; it divides embed_dim.
        dropout: share of the output that is dropped in training.
        bias: whether the projections have one.
        kdim, vdim: width of keys and values; default embed_dim.
        batch_first: whether inputs are [B, L, E] rather than [L, B, E]; False, as in torch.
        causal: whether a position sees no later one; `is_causal` or `attn_mask` of a call say so too.
        spec: options of the mechanism.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = FlowMultiheadAttention(32, 4, batch_first=True).eval()
        >>> query, memory = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
        >>> layer(query, memory, memory)[0].shape
        torch.Size([2, 5, 32])
    """

    # What torch's encoder layer asks before it takes a fused path of its own.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.05, bias: bool = True, *,
        kdim: int | None = None, vdim: int | None = None, batch_first: bool = False, causal: bool = False,
        spec: FlowAttention | None = None, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise RegardError(f"embed_dim is {embed_dim}, which {num_heads} heads do not divide.")
        if not 0 <= dropout < 1:
            raise RegardError(f"dropout is {dropout!r}; it must be from 0 to below 1.")
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.batch_first, self.causal = batch_first, causal
        self.query_projection = nn.Linear(embed_dim, embed_dim, **made)
        self.key_projection = nn.Linear(kdim or embed_dim, embed_dim, **made)
        self.value_projection = nn.Linear(vdim or embed_dim, embed_dim, **made)
        self.out_projection = nn.Linear(embed_dim, embed_dim, **made)
        self.dropout = nn.Dropout(dropout)
        self.mechanism = (spec or FlowAttention()).build()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = False, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the output, of the shape of `query`, and the weights or None.

        Args:
            query, key, value: [L, B, E], [S, B, kdim], [S, B, vdim], or with the batch first.
            key_padding_mask: [B, S], True or -inf at padding, as in torch; in self-attention queries
                there are padding too.
            need_weights: also return the weights, [B, L, S] or one a head; their rows need not sum to 1.
            attn_mask: only one that says causal order, [L, S], True or -inf where hidden.
            average_attn_weights: mean over the heads.
            is_causal: as `causal`.

        Raises:
            ShapeMismatch: where the tensors do not fit together.
            RegardError: for another mask, which flow attention has no scores for.
        """
        lone = query is key
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        self._check(query, key, value)
        hidden = _hidden(key_padding_mask)
        check_padding("key_padding_mask", hidden, (key.shape[0], key.shape[1]))
        causal = self.causal or is_causal or _says_causal(attn_mask)
        q, k, v = self._projected(query, key, value)
        valid = None if hidden is None else ~hidden
        ctx = Context.of(q, k, causal=causal, valid=valid)
        if not lone and not causal:
            ctx = replace(ctx, valid_queries=None)
        out = self._closed(self.mechanism(q, k, v, ctx))
        weights = self.mechanism.matrix(q, k, ctx) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def step(
        self, x: Tensor, state: State | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of new positions of causal self-attention, and the state after them.

        Args:
            x: the new positions only, [L, B, E], or with the batch first.
            state: what this returned before; None at the beginning.
            valid: bool [B, L], False at padding.
        """
        if not self.causal:
            raise RegardError("a layer that is not causal cannot decode step by step; give causal=True.")
        x = x if self.batch_first else x.transpose(0, 1)
        self._check(x, x, x)
        check_padding("valid", valid, (x.shape[0], x.shape[1]))
        q, k, v = self._projected(x, x, x)
        heads, state = self.mechanism.step(q, k, v, state, Context.of(q, k, valid=valid))
        out = self._closed(heads)
        return (out if self.batch_first else out.transpose(0, 1)), state

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = (
            (self.query_projection, query),
            (self.key_projection, key),
            (self.value_projection, value),
        )
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer, x in pairs)
        return q, k, v

    def _closed(self, heads: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.out_projection(heads.transpose(1, 2).flatten(2)))
        return out

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = (self.embed_dim, self.key_projection.in_features, self.value_projection.in_features)
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
            if x.ndim != 3 or x.shape[-1] != width:
                raise ShapeMismatch(f"{name} must be [batch, length, {width}], and is {list(x.shape)}.")
        if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1] != value.shape[1]:
            raise ShapeMismatch(
                "query, key and value must agree in batch, and key and value in length; they are "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}, batch first."
            )


def _hidden(padding: Tensor | None) -> Tensor | None:
    """A padding mask as bool, True at padding; torch's own layers give one of 0 and -inf."""
    if padding is None or not padding.is_floating_point():
        return padding
    hidden = ~unhidden(padding)
    if bool(padding[~hidden].any()):
        raise RegardError("key_padding_mask must be bool, or 0 and -inf alone; it holds other numbers.")
    return hidden


def _says_causal(mask: Tensor | None) -> bool:
    """Whether a mask of torch's form says causal order; another is refused."""
    if mask is None:
        return False
    seen = ~mask if mask.dtype == torch.bool else mask
    said = order_and_padding(seen[None, None]) if mask.ndim == 2 else None
    if said is None or not bool(said[1].all()):
        raise RegardError(
            "attn_mask hides more than later positions, and flow attention has no score matrix for that; "
            "give padding as key_padding_mask."
        )
    return said[0]
