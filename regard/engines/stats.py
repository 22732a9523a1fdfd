"""What is computed with attention weights rather than after them."""

from __future__ import annotations

import torch
from torch import Tensor

TRUSTED = 1e-12
LONG = 400


def column_sum(weights: Tensor, valid_rows: Tensor | None = None) -> Tensor:
    """Return the sum over rows of `weights` [B, H, R, K], [B, H, K].

    Args:
        valid_rows: bool [B, R], rows to count; default all.
    """
    if valid_rows is None:
        return weights.sum(2)
    return torch.matmul(valid_rows.to(weights.dtype)[:, None, None, :], weights)[:, :, 0]


def entropy(weights: Tensor) -> Tensor:
    """Return -sum_j w_j log w_j of each row of `weights` [B, H, R, K], in nats, [B, H, R]."""
    return torch.special.entr(weights).sum(-1)


def logsumexp(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the log of the softmax denominator [B, H, R] of rows whose softmax is already known.

    As weights = exp(scores - lse), any one column gives lse whose weight is not tiny. The first is tried,
    then the last ones, where a causal row has its own key, before the largest is looked for. A row that sees
    nothing but a sink logit has no such column: its value is finite and means nothing.
    """
    first = weights[..., 0]
    if weights.shape[3] and bool((first > TRUSTED).all()):
        return scores[..., 0] - first.log()
    last = weights.shape[2] + 1
    if weights.shape[3] > 2 * last:
        best = weights[..., -last:].amax(-1)
        if bool((best > TRUSTED).all()):
            return scores[..., -last:].amax(-1) - best.log()
    return scores.amax(-1) - weights.amax(-1).clamp_min(torch.finfo(weights.dtype).tiny).log()


def softmax_entropy(scores: Tensor, weights: Tensor, lse: Tensor, rows_sum_to_one: bool = False) -> Tensor:
    """Return the entropy of weights = exp(scores - lse) without a logarithm a weight, [B, H, R].

    -sum w log w = lse * sum w - sum w * scores. Accurate to about 1e-6 times the largest score.

    Args:
        rows_sum_to_one: whether no sink logit takes a share.
    """
    return lse * (1.0 if rows_sum_to_one else weights.sum(-1)) - _row_products(weights, scores)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Return sum_k a_k b_k of each row of [B, H, R, K], without a product in memory where rows are long."""
    if a.shape[-1] < LONG:
        return torch.linalg.vecdot(a, b)
    return torch.einsum("bhrk,bhrk->bhr", a, b)


def row_sum(weights: Tensor) -> Tensor:
    """Return the sum of each row of `weights` [B, H, R, K], [B, H, R]."""
    return weights.sum(-1)


def span_mass(weights: Tensor, span: Tensor) -> Tensor:
    """Return how much of each row falls on a span of keys, [B, H, R].

    Args:
        weights: [B, H, R, K].
        span: bool [B|1, K].
    """
    column = span.to(weights.dtype)[:, None, :, None].expand(weights.shape[0], weights.shape[1], -1, 1)
    return torch.matmul(weights, column)[..., 0]


def top_keys(weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` heaviest keys of each row of `weights` [B, H, R, K], heaviest first.

    Returns:
        Their weights and their indices, both [B, H, R, min(k, K)].
    """
    values, index = torch.topk(weights, min(k, weights.shape[-1]), dim=-1)
    return values, index


def diagonal(weights: Tensor, offset: int) -> tuple[Tensor, int]:
    """Return weights[..., r, r + offset] for all r where that key exists, and the first such r.

    Args:
        weights: [B, H, R, K].
        offset: may be negative.

    Returns:
        A view [B, H, L], and the row it starts at; L may be 0.
    """
    rows, keys = weights.shape[-2:]
    first = min(max(0, -offset), rows)
    if offset >= keys or -offset >= rows:
        return weights[..., 0, :0], first
    return weights.diagonal(offset, -2, -1), first


def pair_mass(weights: Tensor, pairs: list[Tensor]) -> Tensor:
    """Return the sum of `weights` [B, H, R, K] over chosen (row, key) pairs, [B, H].

    Args:
        pairs: for each sequence, integer indices [n] into its R * K weights, row * K + key.
    """
    heads = weights.shape[1]
    flat = weights.reshape(weights.shape[0], heads, -1)
    sums = [
        flat[b].index_select(1, index).sum(1) if len(index) else flat.new_zeros(heads)
        for b, index in enumerate(pairs)
    ]
    return torch.stack(sums)


def masked_mass(weights: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `weights` [B, H, R, K] where `mask` bool [B|1, R, K] is True, [B, H]."""
    batch, heads = weights.shape[:2]
    column = mask.to(weights.dtype).flatten(1)[..., None].expand(batch, -1, 1)
    return torch.bmm(weights.reshape(batch, heads, -1), column)[..., 0]
