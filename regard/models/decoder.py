"""A tiny language model around any mechanism: logits of the next token, layer by layer as in Llama.

    h = embed(tokens)
    h = h + attention(rms(h));  h = h + W_2 (silu(W_1 rms(h)) * W_3 rms(h))      each layer
    logits = embed^T rms(h)

Attention is `MultiHeadAttention`, so that any mechanism with queries, keys and values has the same
projections and positions; a `Block` brings its own. Source: Touvron et al., 2023, arXiv 2302.13971,
section 2.2. Status: partly our choice: embeddings are tied and start at a variance of 1 / dim, so that logits
start at a variance of 1; the sizes are tiny.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.decoding import DecodeState
from regard.attention.mechanism import Mechanism
from regard.attention.multi_head import Given, MultiHeadAttention
from regard.attention.positions import Rotary
from regard.attention.registry import Spec, is_block
from regard.errors import RegardError, ShapeMismatch


class Decoder(nn.Module):
    """A causal language model of a few layers.

    Args:
        vocabulary: number of tokens.
        dim: width of the residual stream.
        layers: number of layers.
        heads: number of query heads.
        mechanism: as `MultiHeadAttention` takes it, or a list of one for each layer.
        kv_heads: number of key heads, default the same as heads.
        positions: "rotary", "alibi", a `Rotary` or None; a `Block` has none.
        gate: output gate of attention, "sigmoid", "silu" or None.
        head_norm: whether each head's output is normalised; a `Block`'s are not.

    Attributes:
        options: what it was made with.

    Example:
        >>> model = Decoder(256, dim=32, layers=2, heads=4, mechanism="linear")
        >>> model(torch.zeros(3, 9, dtype=torch.int64)).shape
        torch.Size([3, 9, 256])
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        mechanism: Given | Sequence[Given] = "softmax",
        kv_heads: int | None = None,
        positions: str | Rotary | None = "rotary",
        gate: str | None = None,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_size(vocabulary, layers)
        chosen = _one_each(mechanism, layers)
        self.options = {
            "vocabulary": vocabulary, "dim": dim, "layers": layers, "heads": heads, "mechanism": mechanism,
            "kv_heads": kv_heads, "positions": positions, "gate": gate, "head_norm": head_norm,
        }  # fmt: skip
        self.embed = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.layers = nn.ModuleList()
        for number, given in enumerate(chosen):
            block = is_block(given)
            attention = MultiHeadAttention(
                dim, heads, mechanism=given, gate=gate, layer=number, layers=layers,
                kv_heads=None if block else kv_heads,
                positions=None if block else positions,
                head_norm=head_norm and not block,
            )  # fmt: skip
            self.layers.append(Layer(dim, attention))
        self.norm = nn.RMSNorm(dim)

    def forward(self, tokens: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Return logits [B, T, vocabulary] of tokens int64 [B, T]; `valid` bool [B, T], False at padding."""
        h = self._embedded(tokens)
        for layer in self.layers:
            h = layer(h, valid)
        return F.linear(self.norm(h), self.embed.weight)

    def step(
        self, tokens: Tensor, states: Sequence[DecodeState] | None = None
    ) -> tuple[Tensor, list[DecodeState]]:
        """Return the logits of new tokens [B, T, vocabulary], and the states of all layers after them."""
        h, after = self._embedded(tokens), []
        for number, layer in enumerate(cast(Iterable[Layer], self.layers)):
            h, state = layer.step(h, None if states is None else states[number])
            after.append(state)
        return F.linear(self.norm(h), self.embed.weight), after

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, new: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return tokens [B, T] with `new` more, the likeliest each, or drawn at a temperature.

        Raises:
            ShapeMismatch: where there is no token to begin with.
        """
        if tokens.shape[-1] == 0:
            raise ShapeMismatch("generate needs at least one token to begin with.")
        logits, states = self.step(tokens)
        for _ in range(new):
            last = logits[:, -1]
            if temperature > 0:
                shares = (last.float() / temperature).softmax(-1)
                chosen = torch.multinomial(shares.cpu(), 1, generator=generator).to(tokens.device)
            else:
                chosen = last.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
            logits, states = self.step(chosen, states)
        return tokens

    def _embedded(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ShapeMismatch(f"tokens must be int64 [batch, time], and are {list(tokens.shape)}.")
        embedded: Tensor = self.embed(tokens)
        return embedded


class Layer(nn.Module):
    """Attention and a gated MLP, each on the normalised residual stream."""

    def __init__(self, dim: int, attention: MultiHeadAttention) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.attention = attention
        self.before, self.between = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.up, self.across = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, h: Tensor, valid: Tensor | None = None) -> Tensor:
        return self._mlp(h + self.attention(self.before(h), valid=valid))

    def step(self, h: Tensor, state: DecodeState | None) -> tuple[Tensor, DecodeState]:
        """Return h after new positions, and the attention's state."""
        out, after = self.attention.step(self.before(h), state)
        return self._mlp(h + out), after

    def _mlp(self, h: Tensor) -> Tensor:
        x = self.between(h)
        out: Tensor = h + self.down(F.silu(self.up(x)) * self.across(x))
        return out


def _one_each(given: Given | Sequence[Given], layers: int) -> list[Given]:
    """The mechanism of each layer."""
    single = (str, Mapping, Spec, Mechanism, Block)
    chosen = [given] * layers if isinstance(given, single) else list(given)
    if len(chosen) != layers:
        raise RegardError(f"mechanism names {len(chosen)}, and there are {layers} layers.")
    built = [id(one) for one in chosen if isinstance(one, nn.Module)]
    if len(set(built)) < len(built):
        raise RegardError("layers cannot share one built mechanism; give its spec, or one for each layer.")
    return chosen


def _check_size(vocabulary: int, layers: int) -> None:
    for name, value in (("vocabulary", vocabulary), ("layers", layers)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
