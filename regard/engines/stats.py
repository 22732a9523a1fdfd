"""What is computed with attention weights rather than after them."""

from __future__ import annotations

import torch
from torch import Tensor


def column_sum(weights: Tensor, valid_rows: Tensor | None = None) -> Tensor:
    """Return the sum over rows of `weights` [B, H, R, K], [B, H, K].

    Args:
        valid_rows: bool [B, R], rows to count; default all.
    """
    if valid_rows is None:
        return weights.sum(2)
    keep = valid_rows.to(weights.dtype)[:, None, None, :]
    return torch.matmul(keep, weights)[:, :, 0]


def entropy(weights: Tensor) -> Tensor:
    """Return -sum_j w_j log w_j of each row of `weights` [B, H, R, K], in nats, [B, H, R]."""
    return torch.special.entr(weights).sum(-1)


def logsumexp(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the log of the softmax denominator [B, H, R] of rows whose softmax is already known.

    As weights = exp(scores - lse), any one column gives lse; the largest does without underflow. A row
    that sees nothing but a sink logit has no such column: its value is finite and means nothing.
    """
    return scores.amax(-1) - weights.amax(-1).clamp_min(torch.finfo(weights.dtype).tiny).log()


def softmax_entropy(
    scores: Tensor,
    weights: Tensor,
    lse: Tensor,
    scratch: Tensor | None = None,
    rows_sum_to_one: bool = False,
) -> Tensor:
    """Return the entropy of weights = exp(scores - lse) without a logarithm a weight, [B, H, R].

    -sum w log w = lse * sum w - sum w * scores. Accurate to about 1e-6 times the largest score.

    Args:
        scratch: memory of the shape of `scores` to work in.
        rows_sum_to_one: whether no sink logit takes a share.
    """
    if scratch is None or (torch.is_grad_enabled() and weights.requires_grad):
        product = weights * scores
    else:
        product = torch.mul(weights, scores, out=scratch)
    mean_score = product.sum(-1)
    return lse * (1.0 if rows_sum_to_one else weights.sum(-1)) - mean_score
