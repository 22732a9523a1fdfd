"""A small classifier of sequences: a stack of mixers, the mean over positions, and a linear layer.

    h = embed(x)
    h = h + mixer(norm(h));  h = h + mlp(norm(h))              for each mixer
    logits = W mean_t norm(h)

Apart from the mixers nothing moves information between positions but the mean at the end. Status: our choice.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class PooledModel(nn.Module):
    """Logits of classes from tokens.

    Args:
        symbols: size of the vocabulary.
        classes: number of classes.
        dim: width of the residual stream.
        mixers: one a layer, each from [B, T, dim] to the same.

    Example:
        >>> import torch
        >>> from regard.attention import MultiHeadAttention
        >>> mixers = [MultiHeadAttention(16, 2, mechanism="linear", causal=False) for _ in range(2)]
        >>> PooledModel(50, 8, 16, mixers)(torch.zeros(3, 9, dtype=torch.int64)).shape
        torch.Size([3, 8])
    """

    def __init__(self, symbols: int, classes: int, dim: int, mixers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, dim)
        self.mixers = nn.ModuleList(mixers)
        self.before = nn.ModuleList(nn.LayerNorm(dim) for _ in self.mixers)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in self.mixers
        )
        self.norm, self.readout = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, classes] of tokens int64 [B, T]."""
        h = self.embed(tokens)
        for norm, mixer, mlp in zip(self.before, self.mixers, self.mlps, strict=True):
            h = h + mixer(norm(h))
            h = h + mlp(h)
        logits: Tensor = self.readout(self.norm(h).mean(1))
        return logits
