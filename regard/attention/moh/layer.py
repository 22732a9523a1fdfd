"""Mixture-of-head attention with its projections: a layer from x to x.

    q, k, v = W_q x, W_k x, W_v x        [B, H, T, D], [B, Hkv, T, D], [B, Hkv, T, D]
    H_i = softmax(q_i k_i^T / sqrt(D)) v_i
    out = sum_i g_i H_i W_O^i            g [B, T, H] by a `HeadRouter`

H times D need not be dim, and layers of one model may have different numbers of heads, as in MoH-DiT. Across,
the router reads the side of the queries.

Source: Jin et al., 2024, arXiv 2410.11842, equation 4. Status: agrees with the official code (SkyworkAI/MoH,
`MoH-DiT/models.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.decoding import DecodeState, check_state, positions_of, with_earlier
from regard.attention.head_router import HeadRouter, Kind, Preset
from regard.attention.matrices import dense_mask, softmax_matrix
from regard.attention.mechanism import Context
from regard.attention.moh.function import weighted
from regard.attention.multi_head import MultiHeadAttention
from regard.attention.positions import Rotary
from regard.attention.registry import get
from regard.engines.rows import attend, expand_heads
from regard.errors import RegardError, ShapeMismatch


class MoHAttention(Block):
    """Softmax attention whose tokens choose and weight their heads; the module of `MixtureOfHeads`.

    Args:
        dim: width of x.
        heads: number of query heads.
        shared: how many of them, the first, are always on.
        active: how many of the others a token uses.
        kind, preset, fine_tune: of the router, see `HeadRouter`.
        head_dim: width of a head; default dim / heads.
        kv_heads: number of key heads, a divisor of heads; default the same.
        causal: whether a position sees no later one.
        positions: "rotary", a `Rotary`, or None.
        bias: whether the projections of q, k, v and the output have one.
        sparse: leave out heads that are off; the result is the same. In training of a router that goes by
            norms all are computed all the same, for its gradient needs them.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = MoHAttention(32, 8, shared=2, active=3, positions="rotary")
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    causal = True

    def __init__(
        self,
        dim: int,
        heads: int,
        shared: int,
        active: int,
        *,
        kind: Kind = "learned",
        preset: Preset = "official",
        fine_tune: bool = False,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = True,
        positions: str | Rotary | None = None,
        bias: bool = False,
        sparse: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = HeadRouter(
            dim, heads, shared, active, kind=kind, preset=preset, fine_tune=fine_tune, **made
        )
        check_layer(dim, heads, head_dim, kv_heads, positions, sparse, kind)
        self.dim, self.heads = dim, heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.causal, self.sparse = causal, sparse  # type: ignore[misc]
        self.positions = positions if isinstance(positions, Rotary | None) else Rotary()
        width = self.kv_heads * self.head_dim
        self.queries = nn.Linear(dim, heads * self.head_dim, bias=bias, **made)
        self.keys, self.values = (nn.Linear(dim, width, bias=bias, **made) for _ in range(2))
        self.output = nn.Linear(heads * self.head_dim, dim, bias=bias, **made)

    @classmethod
    def of(
        cls, layer: MultiHeadAttention, shared: int, active: int, *, fine_tune: bool = True, **options: Any
    ) -> MoHAttention:
        """Return a layer with the projections of a trained one, copied, and a router.

        Args:
            layer: of softmax attention, without gate, norm of heads or ALiBi.
            shared, active, fine_tune, options: as for the class; `kind="query_norm"` learns nothing new.

        Raises:
            RegardError: where the layer is another.
        """
        softmax = get("softmax").module
        plain = isinstance(layer, MultiHeadAttention) and isinstance(layer.mechanism, softmax)
        if not plain or layer.gate is not None or layer.head_norm or layer.positions == "alibi":
            raise RegardError(
                "only a MultiHeadAttention of softmax, without gate, head_norm or ALiBi, can be turned into "
                f"mixture of heads, and this is {layer!r}."
            )
        weight = layer.queries.weight
        made = cls(
            layer.dim, layer.heads, shared, active, fine_tune=fine_tune, head_dim=layer.head_dim,
            kv_heads=layer.kv_heads, causal=layer.causal, positions=layer.positions,
            bias=layer.queries.bias is not None, device=weight.device, dtype=weight.dtype, **options,
        )  # fmt: skip
        for name in ("queries", "keys", "values", "output"):
            getattr(made, name).load_state_dict(getattr(layer, name).state_dict())
        return made.train(layer.training)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, memory: Tensor | None = None) -> Tensor:
        """Return the outputs [B, T, dim]; rows of padding are arbitrary.

        Args:
            x: [B, T, dim].
            mask: bool, False at padding: [B, T], or [B, S] of the memory.
            memory: [B, S, dim], whose keys and values are read in place of those of x, in any order.

        Raises:
            ShapeMismatch: where they do not fit.
        """
        self._check(x, mask, memory)
        if memory is None:
            return self._run(x, None, mask)[0]
        q, own = self._queries(x, positions_of(x, None))
        k, v = self._keys(memory, positions_of(memory, mask))
        ctx = Context.of(q, k, causal=False, valid=mask)
        return self._closed(q, k, v, ctx, x, own, None)

    def step(
        self, x: Tensor, state: DecodeState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, DecodeState]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only.
            state: what this returned before; None at the beginning. `state.select(index)` reorders it.
            mask: bool [B, T] of the new positions, False at padding.

        Raises:
            RegardError: where the layer is not causal.
            ShapeMismatch: where the state is of another batch.
        """
        if not self.causal:
            raise RegardError("a layer that is not causal cannot decode step by step; call it on the whole.")
        self._check(x, mask, None)
        check_state(state, x)
        return self._run(x, state, mask)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the softmax weights of all heads before their gates, [B, H, T, T].

        Raises:
            RegardError: where heads are left out (`sparse`), which have none.
        """
        if self.sparse and self.router.active < self.router.routed:
            raise RegardError(
                "heads that are off are left out and have no weights; set layer.sparse = False to see them."
            )
        self._check(x, mask, None)
        at = positions_of(x, mask)
        (q, _), (k, _) = self._queries(x, at), self._keys(x, at)
        ctx = Context.of(q, k, causal=self.causal, valid=mask)
        return softmax_matrix(q, k, ctx, dense_mask(ctx, q.device))

    def reference(self, x: Tensor) -> Tensor:
        at = positions_of(x, None)
        (q, own), (k, v) = self._queries(x, at), self._keys(x, at)
        ctx = Context.of(q, k, causal=self.causal)
        heads = softmax_matrix(q, k, ctx, dense_mask(ctx, q.device)) @ expand_heads(v, self.heads)
        gates = self.router(x, queries=own, outputs=heads)
        out = torch.zeros_like(x) if self.output.bias is None else self.output.bias.expand_as(x)
        for i, part in enumerate(self.output.weight.split(self.head_dim, 1)):
            out = out + gates[..., i, None] * (heads[:, i] @ part.T)
        return out

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.dim, generator=generator, dtype=torch.float64)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}"

    def _run(self, x: Tensor, state: DecodeState | None, mask: Tensor | None) -> tuple[Tensor, DecodeState]:
        at = positions_of(x, mask, state)
        seen = at.new_zeros(x.shape[0]) if state is None else state.seen
        seen = seen + (x.shape[1] if mask is None else mask.sum(-1))
        (q, own), (k, v) = self._queries(x, at), self._keys(x, at)
        (k, v), known = with_earlier(k, v, mask, state)
        ctx = Context.of(q, k, causal=self.causal, valid=known)
        return self._closed(q, k, v, ctx, x, own, mask), DecodeState(seen, (k, v), known)

    def _queries(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Queries with their positions, and before them."""
        own = self.queries(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return (own if self.positions is None else self.positions(own, at)), own

    def _keys(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.keys, self.values)
        )
        return (k if self.positions is None else self.positions(k, at)), v

    def _closed(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, x: Tensor, own: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention, gates and output projection."""
        router = self.router
        if router.kind == "output_norm":
            out = attend(ctx.inputs(q, k, v))
            gates = router(outputs=out, valid=mask)
            out = out * gates.transpose(1, 2)[..., None].to(out.dtype)
        else:
            gates = router(x, queries=own, valid=mask)
            out = weighted(q, k, v, gates, ctx, self.sparse and not router.straight_through)
        return self.output(out.transpose(1, 2).flatten(2))

    def _check(self, x: Tensor, mask: Tensor | None, memory: Tensor | None) -> None:
        for name, given in (("x", x), ("memory", memory)):
            if given is not None and (given.ndim != 3 or given.shape[-1] != self.dim):
                raise ShapeMismatch(f"{name} must be [batch, time, {self.dim}], and is {list(given.shape)}.")
        if memory is not None and len(memory) != len(x):
            raise ShapeMismatch(f"memory is of {len(memory)} sequences, and x of {len(x)}.")
        of = x if memory is None else memory
        if mask is not None and (mask.shape != of.shape[:2] or mask.dtype != torch.bool):
            raise ShapeMismatch(
                f"mask must be bool {list(of.shape[:2])}, False at padding, and is "
                f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}."
            )


def check_layer(
    dim: int, heads: int, head_dim: Any, kv_heads: Any, positions: Any, sparse: bool, kind: str
) -> None:
    """Refuse options of a layer that do not fit together."""
    for name, value in (("head_dim", head_dim), ("kv_heads", kv_heads)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if head_dim is None and dim % heads:
        raise RegardError(f"dim is {dim}, which {heads} heads do not divide; give head_dim.")
    if kv_heads is not None and heads % kv_heads:
        raise RegardError(f"heads is {heads}, which is no multiple of the {kv_heads} kv_heads.")
    if not isinstance(positions, Rotary) and positions not in (None, "rotary"):
        raise RegardError(f"positions is {positions!r}; it must be 'rotary', a Rotary or None.")
