"""A small causal model around any mixers of positions, for experiments that compare mixers.

    h = embed(tokens), + a causal convolution of width 3, one filter a channel
    h = h + mixer(norm(h));  h = h + mlp(norm(h))          each layer
    logits = readout(norm(h))

Everything but the mixer is the same for all, so that what differs is the mixer. There are no positions: the
convolution says what stands beside what. Status: our choice, after the small recall models of Arora et al.,
2023, arXiv 2312.04927.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.mechanism import Mechanism

REACH = 3


class Heads(nn.Module):
    """A mechanism with projections for its queries, keys, values and output.

    Args:
        dim: width of x.
        heads: number of heads; values have dim / heads each.
        key_width: width of queries and keys a head.
        mechanism: used causally.
    """

    def __init__(self, dim: int, heads: int, key_width: int, mechanism: Mechanism) -> None:
        super().__init__()
        self.heads, self.mechanism = heads, mechanism
        self.queries, self.keys = nn.Linear(dim, heads * key_width), nn.Linear(dim, heads * key_width)
        self.values, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed x, [B, T, dim]."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        return self.output(self.mechanism(q, k, v).transpose(1, 2).flatten(2))


class TinyModel(nn.Module):
    """Logits of the next symbol from tokens, by a stack of mixers.

    Args:
        symbols: size of the vocabulary.
        dim: width of the residual stream.
        mixers: one a layer, each from [B, T, dim] to the same.

    Example:
        >>> import torch
        >>> from regard.attention import Softmax
        >>> mixers = [Heads(16, 2, 8, Softmax().build()) for _ in range(2)]
        >>> TinyModel(50, 16, mixers)(torch.zeros(3, 9, dtype=torch.int64)).shape
        torch.Size([3, 9, 50])
    """

    def __init__(self, symbols: int, dim: int, mixers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed, self.near = nn.Embedding(symbols, dim), nn.Conv1d(dim, dim, REACH, groups=dim)
        self.mixers = nn.ModuleList(mixers)
        self.before = nn.ModuleList(nn.LayerNorm(dim) for _ in self.mixers)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in self.mixers
        )
        self.readout = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, symbols))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, symbols] of tokens int64 [B, T]."""
        h = self.embed(tokens)
        h = h + self.near(F.pad(h.transpose(1, 2), (REACH - 1, 0))).transpose(1, 2)
        for norm, mixer, mlp in zip(self.before, self.mixers, self.mlps, strict=True):
            h = h + mixer(norm(h))
            h = h + mlp(h)
        logits: Tensor = self.readout(h)
        return logits
