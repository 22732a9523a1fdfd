"""Any mechanism with projections, positions and an output gate: a layer from x to x.

    q, k, v = W_q x, W_k x, W_v x            [B, H, T, D], [B, Hkv, T, D], [B, Hkv, T, D]
    q, k = positions(q, k)
    o = mechanism(q, k, v)                   [B, H, T, D]
    o = rms(o)                               head by head, where `head_norm`
    out = W_o (s(W_g x) * o)                 s a sigmoid or SiLU, where there is a gate

A `Block` has projections of its own, so of these only the gate stands around it: out = s(W_g x) * block(x).

Source: Vaswani et al., 2017, arXiv 1706.03762, section 3.2.2; Qiu et al., 2025, arXiv 2505.06708 (the sigmoid
gate after attention); Sun et al., 2023, arXiv 2307.08621, equation 8 (SiLU gate after a norm of each head).
Status: partly our choice, as one module for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import decodes, orders_of
from regard.attention.decoding import DecodeState, check_state, positions_of, with_earlier
from regard.attention.mechanism import Context, Mechanism
from regard.attention.positions import Rotary, alibi
from regard.attention.registry import Spec, fitted
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.site import Site

POSITIONS = (None, "rotary", "alibi")
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}
SHARED = ("dim", "heads", "kv_heads", "head_dim", "layer", "layers")
EPS = 1e-6
Given = str | Mapping[str, Any] | Spec | Mechanism | Block


class MultiHeadAttention(nn.Module):
    """Attention of several heads by any mechanism, with its projections.

    Args:
        dim: width of x.
        heads: number of query heads.
        mechanism: a registered name, a name with options as `Spec.to_dict` gives it, a spec such as
            `SlidingWindow(64)`, or a `Mechanism` or `Block` that is built already. Where only a name is
            given, options called `dim`, `heads`, `kv_heads`, `head_dim`, `layer` or `layers` are those here.
        causal: whether a position sees no later one.
        kv_heads: number of key heads; a divisor of `heads`, default the same.
        head_dim: width of a head; default dim / heads.
        positions: "rotary", "alibi", a `Rotary` of your own, or None.
        gate: "sigmoid" or "silu", what multiplies the heads' outputs before W_o; a module that makes gates
            [B, H, T, 1] of x, such as a `HeadGate`; None for nothing.
        head_norm: whether each head's output is divided by its root mean square.
        bias: whether the projections have one.
        layer, layers: which layer this is, from 0, and of how many, where the mechanism depends on it.
        device, dtype: of the parameters.

    Attributes:
        config: the sizes under the names that transformers gives them, for mechanisms that ask their layer.

    Raises:
        RegardError: where an argument will not do, or the mechanism cannot do what is asked.

    Example:
        >>> layer = MultiHeadAttention(32, 4, mechanism="linear", positions="rotary", gate="sigmoid")
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mechanism: Given = "softmax",
        causal: bool = True,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: str | Rotary | None = None,
        gate: str | nn.Module | None = None,
        head_norm: bool = False,
        bias: bool = False,
        layer: int = 0,
        layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_numbers(dim, heads, kv_heads, head_dim)
        _check_names(positions, gate)
        self.dim, self.heads, self.causal = dim, heads, causal
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.layer, self.layers, self.head_norm = layer, layers, head_norm
        self.positions = Rotary() if positions == "rotary" else positions
        self.activation = gate if isinstance(gate, str) else ""
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate: nn.Module | None = gate if isinstance(gate, nn.Module) else None
        self.config = SimpleNamespace(
            hidden_size=dim, num_attention_heads=heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, num_hidden_layers=layers,
        )  # fmt: skip
        self.mechanism = self._built(mechanism)
        self._check_fit(kv_heads, head_dim)
        width = heads * self.head_dim
        if isinstance(self.mechanism, Mechanism):
            self.queries = nn.Linear(dim, width, **made)
            self.keys = nn.Linear(dim, self.kv_heads * self.head_dim, **made)
            self.values = nn.Linear(dim, self.kv_heads * self.head_dim, **made)
            self.output = nn.Linear(width, dim, **made)
        if self.activation:
            self.gate = nn.Linear(dim, width if isinstance(self.mechanism, Mechanism) else dim, **made)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Return the mixed x, [B, T, dim]; rows of padding are arbitrary.

        Args:
            x: [B, T, dim].
            valid: bool [B, T], False at padding.

        Raises:
            ShapeMismatch: where x or valid does not fit.
            RegardError: where x is not finite (looked at on a CPU alone), or is longer than the positions
                allow, or the mechanism cannot honour padding.
        """
        self._check_input(x, valid)
        if isinstance(self.mechanism, Block):
            return self._gated(x, self.mechanism(x, **self._masked(valid)))
        at = positions_of(x, valid)
        q, k, v = self._projected(x, at)
        ctx = replace(Context.of(q, k, causal=self.causal, valid=valid), bias=self._bias(at, at))
        return self._closed(x, self.mechanism(q, k, v, ctx))

    def step(
        self, x: Tensor, state: DecodeState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, DecodeState]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only, [B, T, dim].
            state: what this returned before; None at the beginning. `state.select(index)` reorders the
                sequences of a batch.
            valid: bool [B, T] of the new positions, False at padding.

        Raises:
            RegardError: where the layer or its mechanism cannot decode.
            ShapeMismatch: where the state is of another batch, width or dtype.
        """
        self._check_decodes()
        self._check_input(x, valid)
        check_state(state, x)
        at = positions_of(x, valid, state)
        seen = at.new_zeros(x.shape[0]) if state is None else state.seen
        seen = seen + (x.shape[1] if valid is None else valid.sum(-1))
        inner = None if state is None else state.inner
        if isinstance(self.mechanism, Block):
            step: Any = self.mechanism.step
            out, inner = step(x, inner, **self._masked(valid))
            return self._gated(x, out), DecodeState(seen, inner)
        q, k, v = self._projected(x, at)
        if self.mechanism.carries_state:
            out, inner = self.mechanism.step(q, k, v, inner, Context.of(q, k, valid=valid))
            return self._closed(x, out), DecodeState(seen, inner)
        (k, v), known = with_earlier(k, v, valid, state)
        before = positions_of(k.transpose(1, 2), known)
        ctx = replace(Context.of(q, k, valid=known), bias=self._bias(at, before))
        return self._closed(x, self.mechanism(q, k, v, ctx)), DecodeState(seen, (k, v), known)

    def extra_repr(self) -> str:
        told = f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}"
        return f"{told}, gate={self.activation}" if self.activation else told

    def _built(self, given: Any) -> Mechanism | Block:
        if isinstance(given, Mechanism | Block):
            return given
        if isinstance(given, str | Mapping):
            known = {name: getattr(self, name) for name in SHARED}
            given = fitted({"mechanism": given} if isinstance(given, str) else given, known)
        if not isinstance(given, Spec):
            raise RegardError(
                f"mechanism is {given!r}; it must be a name, a spec like SlidingWindow(64), or a built one."
            )
        site = Site(f"layer {self.layer}", f"text.{self.layer}", "text", self.layer, self, heads=self.heads)
        built: Mechanism | Block = given.build(site)
        return built

    def _check_fit(self, kv_heads: int | None, head_dim: int | None) -> None:
        """Refuse what the mechanism cannot do."""
        kind, order = type(self.mechanism).__name__, "causal" if self.causal else "full"
        block = isinstance(self.mechanism, Block)
        if order not in orders_of(self.mechanism):
            has = "only causal" if order == "full" else "not causal"
            raise RegardError(f"{kind} is {has}; give causal={not self.causal}.")
        own = {
            "positions": self.positions, "kv_heads": kv_heads, "head_dim": head_dim,
            "head_norm": self.head_norm or None, "a gate of heads": None if self.activation else self.gate,
        }  # fmt: skip
        for name, value in own.items():
            if block and value is not None:
                raise RegardError(
                    f"{kind} has projections of its own, so {name} does not apply; leave it out."
                )
        if not block and head_dim is None and self.dim % self.heads:
            raise RegardError(f"dim is {self.dim}, which {self.heads} heads do not divide; give head_dim.")
        if self.positions == "alibi" and "bias" not in getattr(self.mechanism, "honours", ()):
            raise RegardError(f"{kind} has no scores to add ALiBi's bias to; use rotary positions or none.")

    def _check_input(self, x: Tensor, valid: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeMismatch(
                f"x must be floating-point [batch, time, {self.dim}], and is "
                f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}."
            )
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
            raise ShapeMismatch(
                f"valid must be bool {list(x.shape[:2])}, one for each position, and is "
                f"{str(valid.dtype).removeprefix('torch.')} {list(valid.shape)}."
            )
        if valid is not None and isinstance(self.mechanism, Block) and not _masks(self.mechanism):
            raise RegardError(f"{type(self.mechanism).__name__} cannot leave out padding; give no valid.")
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
            raise RegardError("x holds NaN or infinity; the layer before has gone wrong.")

    def _projected(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        if isinstance(self.positions, Rotary):
            q, k = self.positions(q, at), self.positions(k, at)
        return q, k, v

    def _bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        return alibi(self.heads, queries, keys) if self.positions == "alibi" else None

    def _closed(self, x: Tensor, out: Tensor) -> Tensor:
        """Norm, gate and output projection of heads [B, H, T, D]."""
        if self.head_norm:
            out = F.rms_norm(out, out.shape[-1:], eps=EPS)
        if self.gate is not None and not self.activation:
            out = self.gate(x) * out
        return self.output(self._gated(x, out.transpose(1, 2).flatten(2).to(x.dtype)))

    def _gated(self, x: Tensor, out: Tensor) -> Tensor:
        """The elementwise gate on [B, T, width]."""
        return (
            GATES[self.activation](self.gate(x)) * out if self.gate is not None and self.activation else out
        )

    def _masked(self, valid: Tensor | None) -> dict[str, Tensor]:
        return {} if valid is None else {"mask": valid}

    def _check_decodes(self) -> None:
        """Refuse to decode where steps would not give what the whole gives."""
        name, exempt = type(self.mechanism).__name__, self.mechanism.exempt
        if not self.causal:
            raise RegardError("a layer that is not causal cannot decode step by step; call it on the whole.")
        if decodes(self.mechanism) is None:
            law = "step" if "step" in exempt else "offset"
            raise UnsupportedModel(f"{name} cannot decode step by step: {exempt.get(law, 'it has no step')}.")


def _masks(block: Block) -> bool:
    """Whether a block can leave out padding: whether it takes a mask, bool [B, T]."""
    return "mask" in inspect.signature(block.forward).parameters


def _check_numbers(dim: int, heads: int, kv_heads: int | None, head_dim: int | None) -> None:
    for name, value in {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}.items():
        if value is None and name in ("kv_heads", "head_dim"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if kv_heads is not None and heads % kv_heads:
        raise RegardError(f"heads is {heads}, which is no multiple of the {kv_heads} kv_heads.")


def _check_names(positions: Any, gate: Any) -> None:
    if not isinstance(positions, Rotary) and positions not in POSITIONS:
        raise RegardError(f"positions is {positions!r}; it must be 'rotary', 'alibi', a Rotary or None.")
    if gate is not None and not isinstance(gate, nn.Module) and gate not in GATES:
        raise RegardError(f"gate is {gate!r}; it must be one of {', '.join(GATES)}, a module or None.")
