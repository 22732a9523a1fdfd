"""One layer of attention and a decoder, as two tables, in which attention is seen to learn.

    b_t = softmax over context positions of z[m, x_t]               m = x_T, the query, which is left out
    c   = X^T b,  f = c / ||c||_2                                   no centring, no gain, no residual
    logits = Y^T f

Z and Y are [V, V], a row of Z for each query token and a column of Y for each next token.

Source: "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer" (Tian
et al., 2023, arXiv 2305.16380), section 2, and Lemma 1. Status: agrees with the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch


class Gradients(NamedTuple):
    """By how much the two tables grow at a rate of 1, each [V, V]."""

    z: Tensor
    y: Tensor


class ScanSnapModel(nn.Module):
    """Attention and decoder as tables; both begin at zero.

    Args:
        vocabulary: number of tokens.
        include_query: whether the query attends to its own position too.
        start: standard deviation that the tables begin with.
        dtype: float32 or float64.

    Example:
        >>> model = ScanSnapModel(34)
        >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape
        torch.Size([2, 34])
    """

    def __init__(
        self, vocabulary: int, *, include_query: bool = False, start: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        if vocabulary < 2 or start < 0:
            raise RegardError(f"vocabulary is {vocabulary} and start {start}; they must be 2 and 0 at least.")
        self.include_query = include_query
        self.z = nn.Parameter(start * torch.randn(vocabulary, vocabulary, dtype=dtype))
        self.y = nn.Parameter(start * torch.randn(vocabulary, vocabulary, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next token [B, V], of tokens int64 [B, T], the query last.

        Raises:
            ShapeMismatch: for fewer than two tokens.
        """
        return self.logits(self.attended(*self.counted(tokens)))

    def counted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return how often each token is attended to, [B, V], and the queries, int64 [B]."""
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ShapeMismatch(f"tokens must be int64 [B, T] of two or more, and are {list(tokens.shape)}.")
        context = tokens if self.include_query else tokens[:, :-1]
        counts = self.z.new_zeros(len(tokens), len(self.z))
        return counts.scatter_add_(1, context, torch.ones_like(context, dtype=counts.dtype)), tokens[:, -1]

    def attended(self, counts: Tensor, queries: Tensor) -> Tensor:
        """Return the attention c [..., V] on each token, all its positions together.

        Args:
            counts: how often each token stands there, or how likely it is, [..., V].
            queries: int64 [...].
        """
        return (counts.log() + self.z[queries]).softmax(-1)

    def logits(self, attended: Tensor) -> Tensor:
        """Return logits [..., V] of attention c [..., V]."""
        return F.normalize(attended, dim=-1, eps=0.0) @ self.y

    @torch.no_grad()
    def gradients(self, counts: Tensor, queries: Tensor, targets: Tensor, shares: Tensor) -> Gradients:
        """Return the gradients of Lemma 1, as formulas, of sequences that count for `shares`.

            dY = f (x - p)^T
            dZ = x_T (x - p)^T Y^T (1 - f f^T) / ||c||  X^T diag(b) X

        Args:
            counts: [N, V].
            queries, targets: int64 [N].
            shares: what each counts for, [N]; 1/N for the mean.
        """
        c = self.attended(counts, queries)
        norm = c.norm(dim=-1, keepdim=True)
        f = c / norm
        wrong = F.one_hot(targets, len(self.y)).to(c.dtype) - (f @ self.y).softmax(-1)
        wrong = wrong * shares[:, None]
        back = wrong @ self.y.T
        back = (back - f * (f * back).sum(-1, keepdim=True)) / norm
        return Gradients(torch.zeros_like(self.z).index_add_(0, queries, back * c), f.T @ wrong)
