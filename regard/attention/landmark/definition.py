"""Landmark attention with a memory by definition: token by token, every key turned to where it is read at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.attention.landmark.groups import grouped_softmax
from regard.attention.mechanism import Context
from regard.engines.rows import expand_heads

if TYPE_CHECKING:
    from regard.attention.landmark.memory import LandmarkMemoryHeads


def memory_matrix(heads: LandmarkMemoryHeads, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """Return the weight of each key for each row, [B, H, T, S]; rows of padding are 0."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(kind), expand_heads(k, q.shape[1]).to(kind)
    scale = float(q.shape[-1]) ** -0.5 if ctx.scale is None else ctx.scale
    rows = []
    for row in range(q.shape[0]):
        keys = torch.arange(k.shape[2], device=q.device)
        queries = keys[k.shape[2] - q.shape[2] :]
        if ctx.valid_keys is not None:
            keys, queries = keys[ctx.valid_keys[row]], queries[ctx.valid_keys[row, queries]]
        weights = q.new_zeros(*q.shape[1:3], k.shape[2])
        for key in queries.tolist():
            token = int((keys < key).sum())
            at = key - (k.shape[2] - q.shape[2])
            read, shares = _row(heads, q[row, :, at], k[row, :, keys], token, scale)
            places = torch.zeros_like(shares, dtype=torch.int64) + keys[read]
            line = torch.zeros_like(weights[:, 0]).scatter(-1, places, shares)
            weights = weights.index_add(1, torch.tensor([at], device=q.device), line[:, None])
        rows.append(weights)
    return torch.stack(rows) if rows else q.new_zeros(*q.shape[:3], k.shape[2])


def _row(heads: LandmarkMemoryHeads, q: Tensor, k: Tensor, token: int, scale: float) -> tuple[Tensor, Tensor]:
    """Which tokens a query q [H, D] at `token` reads, int64 [H, n], and their weights."""
    sizes, block = heads.sizes, heads.sizes.block
    start = token // sizes.local * sizes.local
    last = start // block
    first = 0 if sizes.memory is None else max(0, last - sizes.memory)
    m, near = last - first, torch.arange(start, token + 1, device=q.device)
    count = min(heads.top_k, m)
    distances = [min(m - i, count + 1) for i in range(m)]
    found = [
        _score(heads, q, k, token, b, d, start) for b, d in zip(range(first, last), distances, strict=True)
    ]
    scores = torch.stack(found, 1).detach() * scale if m else q.new_zeros(len(q), 0)
    if heads.share and m:
        scores = scores.softmax(-1).amax(0, keepdim=True).expand_as(scores)
    chosen = scores.sort(dim=-1, descending=True, stable=True)[1][:, :count].sort(-1)[0]
    if heads.choose == "recent":
        chosen = torch.arange(m - count, m, device=q.device).expand(len(q), -1)
    inside = torch.arange(block, device=q.device)
    tokens = ((first + chosen)[..., None] * block + inside).flatten(1)
    ranks = torch.arange(count, device=q.device)
    away = count - ranks + (chosen < m - count).long()  # blocks before the section
    stands = ((start - away * block)[..., None] + inside).flatten(1)
    tokens = torch.cat([tokens, near.expand(len(q), -1)], 1)
    stands = torch.cat([stands, near.expand(len(q), -1)], 1)
    each = k.gather(1, tokens[..., None].expand(-1, -1, k.shape[-1]))
    if heads.turns is not None:
        each = torch.stack([heads.turns(x, t, s) for x, t, s in zip(each, tokens, stands, strict=True)])
    logits = (q[:, None] * each).sum(-1) * scale
    landmark = tokens[:1] % block == block - 1
    weights, _ = grouped_softmax(
        logits[None, :, None], landmark, torch.ones(1, dtype=torch.bool, device=q.device)
    )
    return tokens, weights[0, :, 0]


def _score(
    heads: LandmarkMemoryHeads, q: Tensor, k: Tensor, token: int, block: int, distance: int, start: int
) -> Tensor:
    """The score [H] of a block for a query at `token`, the block `distance` blocks before its section."""
    size = heads.sizes.block
    tokens = block * size + torch.arange(size, device=q.device)
    keys = k[:, tokens]
    if heads.turns is not None:
        keys = heads.turns(keys, tokens, start - distance * size + tokens % size)
    mark = keys[:, :-1].mean(1) if heads.choose == "mean" else keys[:, -1]
    return (q * mark).sum(-1)
