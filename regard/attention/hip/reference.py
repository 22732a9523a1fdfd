"""What HiP attends to, by definition: one sequence, head and block of queries at a time, in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.attention.mechanism import Context

if TYPE_CHECKING:
    from regard.attention.hip.spec import HiP

Score = Callable[[int], float]


def seen_by_definition(q: Tensor, k: Tensor, ctx: Context, spec: HiP) -> Tensor:
    """Return which keys each row reads, bool [B, H, T, S]; none in rows of padding.

    Args:
        q: [B, H, T, D], k [B, Hkv, S, D].
    """
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    known = min(keys, ctx.offset + queries) if ctx.causal else keys
    seen = torch.zeros(batch, heads, queries, keys, dtype=torch.bool, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for b in range(batch):
        rows = (
            torch.arange(queries) if ctx.valid_queries is None else ctx.valid_queries[b].nonzero()[:, 0].cpu()
        )
        columns = torch.arange(known)
        if ctx.valid_keys is not None:
            columns = ctx.valid_keys[b, :known].nonzero()[:, 0].cpu()
        for h in range(heads):
            one = q[b, h, rows].to(wide), k[b, h * k.shape[1] // heads, columns].to(wide)
            found = _seen_by_head(*one, ctx.causal, spec)
            seen[b, h, rows[:, None], columns] = found.to(q.device)
    return seen


def _seen_by_head(q: Tensor, k: Tensor, causal: bool, spec: HiP) -> Tensor:
    """bool [T, S] of one head, without padding."""
    rows, keys = len(q), len(k)
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    places = [i + keys - rows + 1 if causal else keys for i in range(rows)]
    for start in range(0, rows, spec.query_block):
        block = range(start, min(start + spec.query_block, rows))
        chosen = _chosen(q, k, places, block, spec)
        for i in block:
            before = places[i] - spec.window
            for j in chosen:
                seen[i, j * spec.key_block : max(0, min((j + 1) * spec.key_block, before))] = True
            seen[i, : max(0, min(spec.sink, before))] = True
            seen[i, max(0, before) : places[i]] = spec.window > 0
    return seen


def _chosen(q: Tensor, k: Tensor, places: list[int], block: range, spec: HiP) -> list[int]:
    span = max(0, places[block[-1]] - spec.window - spec.sink)
    first, count = spec.sink // spec.key_block, -(-span // spec.key_block)
    keep = -(-spec.k // spec.key_block)
    if count <= keep:
        return list(range(first, first + count))
    sampled = list(block)[spec.query_stride - 1 :: spec.query_stride] or [block[-1]]

    def score(speaker: int) -> float:
        best = torch.finfo(q.dtype).min
        for j in range(speaker * spec.key_block, (speaker + 1) * spec.key_block, spec.key_stride):
            for i in sampled:
                if j < places[i] - spec.window:
                    best = max(best, float(q[i] @ k[j]))
        return best

    return (_doubled if spec.variant == "v1" else _halved)(score, first, count, keep, spec)


def _halved(score: Score, first: int, count: int, keep: int, spec: HiP) -> list[int]:
    edges = [j * count // keep + first for j in range(keep + 1)]
    chunks = [(a, b - a) for a, b in pairwise(edges)]
    largest = max(size for _, size in chunks)
    while largest > 1:
        halves = [half for a, size in chunks for half in ((a, size // 2), (a + size // 2, size - size // 2))]
        scores = [
            score(a + size // 2 if spec.representative == "center" else a) if size else -float("inf")
            for a, size in halves
        ]
        best = sorted(range(len(halves)), key=lambda n: (-scores[n], n))[:keep]
        chunks = [halves[n] for n in sorted(best)]
        largest = -(-largest // 2)
    return [a for a, _ in chunks]


def _doubled(score: Score, first: int, count: int, keep: int, spec: HiP) -> list[int]:
    cells, grid = list(range(keep)), keep
    while grid < count:
        finer = min(2 * grid, count)
        children = [c for cell in cells for c in range(cell * finer // grid, (cell + 1) * finer // grid)]
        scores = [score(c * count // finer + first) for c in children]
        best = sorted(range(len(children)), key=lambda n: (-scores[n], n))[:keep]
        cells, grid = [children[n] for n in sorted(best)], finer
    return [cell + first for cell in cells]
