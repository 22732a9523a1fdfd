"""The small transformer on which sinks, drains and peaks can be made and unmade.

    h = token[x_t] + position[t]
    h = h + W_O (A (W_V ln(h)));   h = h + W_2 relu(W_1 ln(h))        each layer, 4x wide inside
    logits = U ln(h)

    A = softmax(S),  or  A_ij = relu(S_ij) / (i + 1)                  S = q k^T / sqrt(d), causal, i from 0

No biases but the norms', and U is not tied. With relu nothing forces a head to put its weight somewhere.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo
et al., 2024, arXiv 2410.13835). Status: agrees with the official code (`BBM/model.py`), whose names the
weights have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch

KINDS = ("softmax", "relu")


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened inside, layer by layer.

    Attributes:
        logits: [B, T, V].
        scores: of each layer [B, H, T, T], -inf where a key is later than the query.
        weights: of each layer [B, H, T, T].
        written: of each layer [B, H, T], the norm of every head's value after the output projection.
        residual: of each layer [B, T], the norm of what the layer hands on.
    """

    logits: Tensor
    scores: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    residual: tuple[Tensor, ...]


class BackcopyModel(nn.Module):
    """A causal language model of one to a few layers.

    Args:
        vocabulary: number of tokens.
        dim: width of the residual stream.
        layers: number of layers.
        heads: number of heads.
        attention: `softmax` or `relu`.
        longest: the most tokens it takes.

    Raises:
        RegardError: for another attention, or a width that heads do not divide.

    Example:
        >>> model = BackcopyModel(67, dim=16, layers=1)
        >>> model(torch.zeros(2, 9, dtype=torch.int64)).shape
        torch.Size([2, 9, 67])
    """

    def __init__(
        self, vocabulary: int, *, dim: int = 256, layers: int = 1, heads: int = 1,
        attention: str = "softmax", longest: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        if attention not in KINDS:
            raise RegardError(f"attention is {attention!r}; it must be one of {', '.join(KINDS)}.")
        if min(vocabulary, dim, layers, heads, longest) < 1 or dim % heads:
            raise RegardError(
                f"dim is {dim}, layers {layers}, heads {heads} and longest {longest}; each must be at least "
                "1, and heads must divide dim."
            )
        self.options: dict[str, Any] = {
            "vocabulary": vocabulary, "dim": dim, "layers": layers, "heads": heads, "attention": attention,
            "longest": longest,
        }  # fmt: skip
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.pos_embeddings = nn.Embedding(longest, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, attention) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] of tokens int64 [B, T].

        Raises:
            ShapeMismatch: for tokens of another shape, or more than it takes.
        """
        h = self._embedded(tokens)
        for layer in self.layers:
            h = layer(h)
        logits: Tensor = self.output(self.norm(h))
        return logits

    @torch.no_grad()
    def trace(self, tokens: Tensor) -> Trace:
        """Return what happens inside on tokens int64 [B, T], without gradients."""
        h = self._embedded(tokens)
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for layer in cast(Iterable[Layer], self.layers):
            x = layer.attention_norm(h)
            scores, weights, v = layer.attention.parts(x)
            h = layer(h)
            found.append((scores, weights, layer.attention.written(v), h.norm(dim=-1)))
        return Trace(self.output(self.norm(h)), *zip(*found, strict=True))

    def _embedded(self, tokens: Tensor) -> Tensor:
        longest = self.pos_embeddings.num_embeddings
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] > longest:
            raise ShapeMismatch(f"tokens must be int64 [B, up to {longest}], and are {list(tokens.shape)}.")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.tok_embeddings(tokens) + self.pos_embeddings(places)
        return embedded


class Layer(nn.Module):
    """Attention and a ReLU MLP, each on the normalised residual stream."""

    def __init__(self, dim: int, heads: int, attention: str) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, attention)
        self.ff = FeedForward(dim, 4 * dim)
        self.attention_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        out: Tensor = h + self.ff(self.ff_norm(h))
        return out


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.relu(self.w1(x)))
        return out


class Attention(nn.Module):
    """Causal attention by softmax or relu."""

    def __init__(self, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "softmax":
            q, k, v = self._projected(x)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            _, weights, v = self.parts(x)
            mixed = weights @ v
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores and weights [B, H, T, T] and values [B, H, T, d] of x [B, T, D]."""
        q, k, v = self._projected(x)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        length = x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        if self.kind == "softmax":
            return scores, scores.softmax(-1), v
        seen = torch.arange(1, length + 1, device=x.device, dtype=scores.dtype)[:, None]
        return scores, scores.relu() / seen, v

    def written(self, v: Tensor) -> Tensor:
        """Return the norms [B, H, T] of values [B, H, T, d] after the output projection."""
        weight = self.wo.weight.unflatten(1, (self.heads, -1))
        return torch.einsum("ohd,bhtd->bhto", weight, v).norm(dim=-1)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.wq, self.wk, self.wv)
        )
        return q, k, v
