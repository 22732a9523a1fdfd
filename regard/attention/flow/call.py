"""Flow-Attention as a function of queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.attention.checks import check_call
from regard.attention.flow.heads import AUTO, FlowAttentionHeads
from regard.attention.flow.spec import FlowAttention
from regard.attention.mechanism import Context
from regard.errors import RegardError, ShapeMismatch

METHODS = ("chunk", "naive", "recurrent")


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    clamp: float | str | None = AUTO,
    kernel: str = "sigmoid",
    eps: float = 1e-6,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    method: str = "chunk",
) -> Tensor:
    """Return Flow-Attention [B, H, L, Dv] of queries over keys and values.

    Args:
        q: [B, H, L, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv, and keys and values are repeated.
        v: [B, Hkv, S, Dv].
        causal: whether a position sees no later one; needs L = S.
        clamp: bound on what leaves a source, before the competition; "auto" is 10 where causal, else None.
        kernel: phi, "sigmoid" or "relu", which is relu(x) + 1e-6.
        eps: added to both sides of every product of flows.
        key_mask: bool [B, S], False at padding. Where causal it holds for the queries too.
        query_mask: bool [B, L], False at padding; only where not causal.
        method: "chunk"; "naive", the definition with its L x S matrix; "recurrent", position by position.

    Raises:
        ShapeMismatch: where the tensors do not fit, or causal with L other than S.
        RegardError: for NaN or infinity, or an option that is not known.

    Example:
        >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 1)
        >>> flow_attention(q, k, v).flatten().tolist()
        [0.7310..., 0.7310...]
    """
    check_call(q, k, v)
    if method not in METHODS:
        raise RegardError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    for name, mask, length in (("key_mask", key_mask, k.shape[2]), ("query_mask", query_mask, q.shape[2])):
        _check_mask(name, mask, q.shape[0], length)
    attention = FlowAttention(clamp=clamp, kernel=kernel, eps=eps).build()
    if causal:
        _check_causal(q, k, query_mask)
        if method == "recurrent":
            return _recurrent(attention, q, k, v, key_mask)
        ctx = Context.of(q, k, valid=key_mask)
    elif method == "recurrent":
        raise RegardError("method 'recurrent' needs causal=True: without an order there is no state.")
    else:
        ctx = replace(Context.of(q, k, causal=False, valid=key_mask), valid_queries=query_mask)
    if method == "naive":
        return attention.reference(q, k, v, ctx).to(v.dtype)
    return attention(q, k, v, ctx)


def _recurrent(
    attention: FlowAttentionHeads, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None
) -> Tensor:
    state, outs = None, [q.new_zeros(*q.shape[:2], 0, v.shape[3], dtype=v.dtype)]
    for i in range(q.shape[2]):
        q_, k_, v_ = (x[:, :, i : i + 1] for x in (q, k, v))
        ctx = Context.of(q_, k_, valid=None if valid is None else valid[:, i : i + 1])
        out, state = attention.step(q_, k_, v_, state, ctx)
        outs.append(out)
    return torch.cat(outs, 2)


def _check_causal(q: Tensor, k: Tensor, query_mask: Tensor | None) -> None:
    if q.shape[2] != k.shape[2]:
        raise ShapeMismatch(
            f"causal flow attention is over one sequence: L is {q.shape[2]} and S {k.shape[2]}; leave causal "
            "out for queries over another sequence."
        )
    if query_mask is not None:
        raise RegardError("causal flow attention is over one sequence, so give key_mask and no query_mask.")


def _check_mask(name: str, mask: Tensor | None, batch: int, length: int) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, length)):
        raise ShapeMismatch(
            f"{name} must be bool [{batch}, {length}], False at padding, and is "
            f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}: flow attention has no "
            "score matrix that another mask or a bias could be laid on."
        )
