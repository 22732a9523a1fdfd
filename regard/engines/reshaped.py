"""Attention whose weights are any row-wise function of its scores, a block of query rows at a time.

    scores  = softcap(scale * q k^T) + bias + mask     [B, H, R, K], hidden keys the lowest number there is
    weights = reshape(scores)                          [B, H, R, K]
    outputs = dropout(weights) v                       [B, H, R, Dv]

Exact. Scores are float32, or float64 where q is. Memory is O(B * H * R * K) for one block of R rows, also
under autograd, where backward computes the scores once more; with dropout, or where a soft-cap, bias or sink
logit needs a gradient, all blocks are kept instead, as O(B * H * T * S).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.rows import AttentionInputs, sink_column

Reshape = Callable[..., Tensor]
Place = tuple[int, int, int, int]
BLOCK_NUMBERS = {"cpu": 2**20, "cuda": 2**26}
MIN_ROWS, MAX_ROWS = 16, 512


def attend_reshaped(x: AttentionInputs, reshape: Reshape, *, beside: Tensor | None = None) -> Tensor:
    """Return attention by other weights than a softmax, [B, H, T, Dv], in the dtype of the values.

    Gradients of q, k and v are of first order only.

    Args:
        x: the call. Sink logits join as a last column of the scores, and their weight is then dropped.
        reshape: from scores [B, H, R, K] to weights of the same shape, row by row, differentiable and
            without parameters of its own; it does not write into the scores.
        beside: what the reshape also takes, as a second argument: numbers of each row, [B|1, H|1, T, N],
            of which it gets those of its rows.

    Example:
        >>> from regard.attention import Context
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> attend_reshaped(Context.of(q, k).inputs(q, k, v), torch.sigmoid).shape
        torch.Size([1, 2, 5, 8])
    """
    others = (x.bias, x.sink_logits)
    kept = x.dropout or x.softcap is not None or any(o is not None and o.requires_grad for o in others)
    if kept or not torch.is_grad_enabled() or not any(t.requires_grad for t in (x.q, x.k, x.v)):
        return _attend(x, reshape, beside)
    return _Recomputed.apply(x.q, x.k, x.v, x, reshape, beside)


def _attend(x: AttentionInputs, reshape: Reshape, beside: Tensor | None) -> Tensor:
    q, k = _scaled(x)
    parts = []
    for place in _places(x):
        start, stop, first, last = place
        scores = _scores(x, q[:, :, start:stop], k[:, :, first:last], place)
        weights = _weights(x, scores, reshape, beside, place)
        weights = F.dropout(weights, x.dropout) if x.dropout else weights
        parts.append(_grouped(weights.to(x.v.dtype), x.v[:, :, first:last]))
    return torch.cat(parts, 2) if parts else x.q.new_zeros(*x.q.shape[:3], x.v.shape[3]).to(x.v.dtype)


class _Recomputed(torch.autograd.Function):
    """The same; backward computes the scores of a block once more, and keeps one block at a time."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, x: AttentionInputs, reshape: Reshape, beside: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rest = replace(x, q=None, k=None, v=None)  # type: ignore[arg-type]
        ctx.reshape, ctx.beside = reshape, beside
        return _attend(replace(x, q=q, k=k, v=v), reshape, beside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        x: AttentionInputs = replace(ctx.rest, q=given[0], k=given[1], v=given[2])
        q, k = _scaled(x)
        v, grad = x.v.to(q.dtype), grad.to(q.dtype)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for place in _places(x):
            start, stop, first, last = place
            some, keys = q[:, :, start:stop], k[:, :, first:last]
            scores, out = _scores(x, some, keys, place), grad[:, :, start:stop]
            of_weights = _grouped(out, v[:, :, first:last].transpose(2, 3))
            with torch.enable_grad():
                weights = _weights(x, scores.requires_grad_(), ctx.reshape, ctx.beside, place)
                (of_scores,) = torch.autograd.grad(weights, scores, of_weights)
            of_v[:, :, first:last] += _shared(weights.detach(), out, v.shape[1])
            of_q[:, :, start:stop] = _grouped(of_scores, keys)
            of_k[:, :, first:last] += _shared(of_scores, some, k.shape[1])
        found = (of_q.mul_(x.scale), of_k, of_v)
        return *(g.to(t.dtype) for g, t in zip(found, given, strict=True)), None, None, None


def _scaled(x: AttentionInputs) -> tuple[Tensor, Tensor]:
    """The queries times the scale, and the keys, in the dtype of the scores."""
    kind = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    return x.q.to(kind) * x.scale, x.k.to(kind)


def _places(x: AttentionInputs) -> Iterator[Place]:
    """The rows of each block, and the keys that they may see."""
    start, length = 0, x.q.shape[2]
    while start < length:
        seen = x.mask.bounds(start, min(start + MIN_ROWS, length))
        budget = BLOCK_NUMBERS.get(x.q.device.type, BLOCK_NUMBERS["cuda"])
        fit = budget // (max(1, x.q.shape[0] * x.heads) * max(1, seen[1] - seen[0]))
        stop = min(length, start + max(MIN_ROWS, min(MAX_ROWS, fit // MIN_ROWS * MIN_ROWS)))
        yield start, stop, *x.mask.bounds(start, stop)
        start = stop


def _scores(x: AttentionInputs, q: Tensor, k: Tensor, place: Place) -> Tensor:
    start, stop, first, last = place
    scores = _grouped(q, k.transpose(2, 3))
    if x.softcap is not None:
        scores = torch.tanh(scores / x.softcap) * x.softcap
    if x.bias is not None:
        bias = x.bias if x.bias.shape[-2] == 1 else x.bias[..., start:stop, :]
        scores = scores + bias[..., first:last]
    return x.mask.apply(scores, start, stop, first, last)


def _weights(
    x: AttentionInputs, scores: Tensor, reshape: Reshape, beside: Tensor | None, place: Place
) -> Tensor:
    given = () if beside is None else (beside[:, :, place[0] : place[1]],)
    if x.sink_logits is None:
        return reshape(scores, *given)
    sinks = sink_column(x.sink_logits).to(scores.dtype)
    sinks = sinks if sinks.shape[2] == 1 else sinks[:, :, place[0] : place[1]]
    return reshape(torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1), *given)[..., :-1]


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """Return left [B, H, R, N] times right [B, Hkv, N, M], each right matrix shared by H / Hkv heads."""
    batch, heads, rows, width = left.shape
    kv_heads = right.shape[1]
    if heads == kv_heads:
        return left @ right
    flat = left.reshape(batch, kv_heads, heads // kv_heads * rows, width)
    return (flat @ right).view(batch, heads, rows, right.shape[3])


def _shared(left: Tensor, right: Tensor, kv_heads: int) -> Tensor:
    """Return left^T right, [B, Hkv, N, M], of [B, H, R, N] and [B, H, R, M], summed over heads of a group."""
    batch, heads, rows, _ = left.shape
    shape = (batch, kv_heads, heads // kv_heads * rows)
    return left.reshape(*shape, -1).transpose(2, 3) @ right.reshape(*shape, -1)
