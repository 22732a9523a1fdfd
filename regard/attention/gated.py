"""Gated attention: a head multiplies what it says by a gate, and so can say nothing.

    out_h = pi_h(x) * softmax(q_h k_h^T / sqrt(d)) v_h       [B, T, d] a head;  pi as in `gates`
    out = W_o [out_1, ..., out_H]

Source: Bondarenko et al., 2023, arXiv 2306.12929, section 4.2, equation 5. Status: agrees with the official
code (Qualcomm-AI-research/outlier-free-transformers, `OPTAttentionWithExtras`). Any kernel serves, for the
gate comes after it. `add_gates` puts gates into a model of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.checks import refuse_nan
from regard.attention.costs import READS_CACHE
from regard.attention.gates import GateKind, HeadGate, check_gate
from regard.attention.mechanism import Context
from regard.attention.registry import Spec, mechanism
from regard.engines.rows import attend
from regard.errors import RegardError, ShapeMismatch


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, causal: bool = True, valid: Tensor | None = None
) -> Tensor:
    """Return softmax attention times a gate for every head and position.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        gate: [B, H, T, 1], such as a `HeadGate` gives; 1 in place of T is one for all positions.
        causal: whether a row sees no later key.
        valid: bool [B, S], False at padding.

    Returns:
        [B, H, T, Dv], in the dtype of v.

    Raises:
        ShapeMismatch: where they do not fit together.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> gated_attention(q, k, v, torch.zeros(1, 2, 5, 1)).abs().max()
        tensor(0.)
    """
    refuse_nan(q=q, k=k, v=v, gate=gate)
    shape = (*q.shape[:3], 1)
    if gate.shape not in (shape, (*q.shape[:2], 1, 1)):
        raise ShapeMismatch(f"gate must be {list(shape)}, and is {list(gate.shape)}.")
    out = attend(Context.of(q, k, causal=causal, valid=valid).inputs(q, k, v))
    return (out * gate).to(v.dtype)


class GatedAttentionLayer(Block):
    """Gated attention with its projections; the module of `Gated`."""

    causal = True

    def __init__(self, dim: int, heads: int, kind: GateKind, start: float | None) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.keys = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.values, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gate = HeadGate(dim, heads, kind=kind, start=start)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return q, k and v, [B, H, T, dim / H] each."""
        return [
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)[0]

    def step(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the outputs of new positions [B, T, dim], and the keys and values up to them.

        Args:
            x: the new positions only, [B, T, dim].
            state: what this returned before, keys and values [B, H, S, dim / H]; None at the beginning.
        """
        gate, (q, k, v) = self.gate(x), self.parts(x)
        if state is not None:
            k, v = (torch.cat([old.to(new), new], 2) for old, new in zip(state, (k, v), strict=True))
        out = gated_attention(q, k, v, gate)
        return self.output(out.transpose(1, 2).flatten(2)), (k, v)

    def reference(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        width, heads = x.shape[-1] // self.heads, []
        for h in range(self.heads):
            scores = (q[:, h] @ k[:, h].transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
            gate = torch.sigmoid(self._logit(x, h, width))
            heads.append(gate * (scores.softmax(-1) @ v[:, h]))
        return self.output(torch.cat(heads, -1))

    def _logit(self, x: Tensor, h: int, width: int) -> Tensor:
        """What a head's own predictor says of x, [B, T, 1], written out head by head."""
        gate, own = self.gate, x[..., h * width : (h + 1) * width]
        if gate.kind == "constant":
            return gate.bias[h].expand(*x.shape[:2], 1)
        if gate.kind == "mlp":
            own = (own @ gate.inner[h] + gate.inner_bias[h]).relu()
        return (x if gate.kind == "joint" else own) @ gate.weight[h][:, None] + gate.bias[h]

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.gate.dim, generator=generator, dtype=torch.float64)


@mechanism("gated")
@dataclass(frozen=True, kw_only=True)
class Gated(Spec):
    """Softmax attention whose heads are gated by the layer's input; a causal layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of heads; it divides dim.
        kind: what the gate reads, "linear", "mlp", "joint" or "constant".
        start: the gate at the beginning, between 0 and 1; None as drawn.

    Example:
        >>> Gated(dim=32, heads=4, kind="mlp").build()(torch.randn(2, 9, 32)).shape
        torch.Size([2, 9, 32])
    """

    module: ClassVar = GatedAttentionLayer
    costs: ClassVar = READS_CACHE
    dim: int
    heads: int
    kind: GateKind = "linear"
    start: float | None = 0.5

    def __post_init__(self) -> None:
        check_gate(self.dim, self.heads, self.kind, self.start, False)
        if self.dim % self.heads:
            raise RegardError(f"dim is {self.dim}, which {self.heads} heads do not divide.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        kinds: tuple[Any, ...] = ("linear", "mlp", "joint", "constant")
        return *(cls(dim=24, heads=3, kind=kind) for kind in kinds), cls(dim=16, heads=2, start=None)
