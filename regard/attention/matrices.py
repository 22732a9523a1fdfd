"""Definitions that several mechanisms share: the dense mask of a call, and softmax weights under it."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.mechanism import Context
from regard.engines.rows import expand_heads, sink_column


def dense_mask(ctx: Context, device: torch.device) -> Tensor | None:
    """Return the whole mask of a call, [B|1, H|1, T, S], bool or additive; None where all is visible."""
    mask = ctx.mask.rows(0, ctx.mask.queries, 0, ctx.mask.keys)
    return None if mask is None else mask.to(device)


def score_matrix(q: Tensor, k: Tensor, ctx: Context, mask: Tensor | None) -> Tensor:
    """Return scaled, capped and biased scores under a dense mask, [B, H, T, S]; hidden keys the lowest.

    In float32 or, from float64, float64.

    Args:
        mask: [B|1, H|1, T, S], bool or additive, or None.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    x = ctx.inputs(q, k, k)
    scores = q.to(kind) @ expand_heads(k, q.shape[1]).to(kind).transpose(-1, -2) * x.scale
    if ctx.softcap is not None:
        scores = ctx.softcap * torch.tanh(scores / ctx.softcap)
    if ctx.bias is not None:
        scores = scores + ctx.bias[..., : k.shape[2]]
    if mask is not None and mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(kind).min)
    return scores if mask is None else scores + mask


def softmax_matrix(q: Tensor, k: Tensor, ctx: Context, mask: Tensor | None) -> Tensor:
    """Return softmax weights [B, H, T, S] under a dense mask; see `score_matrix`."""
    scores = score_matrix(q, k, ctx, mask)
    if ctx.sink_logits is None:
        return scores.softmax(-1)
    sinks = sink_column(ctx.sink_logits).to(scores.dtype).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
