"""The token mixer of TransNormerLLM: lightning attention with projections, norm and gate (GLA).

    q = f(x W_q)   k = f(x W_k)   v = x W_v   u = x W_u        x [B, T, dim]; q, k, v [B, H, T, d]
    y = (norm(lightning(lrpe(q), lrpe(k), v)) * g(u)) W_o      norm over all heads together

f is SiLU. LRPE is a rotation by learned angles: lrpe(x)_n = [x cos(n theta), x sin(n theta)], with
theta [H, 1, d], which doubles the width of q and k, so that scores depend on the distance alone.

    preset        f on v   norm                      gate g(u)                            rates
    paper         no       RMS, no weight (srms)     u                                    alibi
    official      yes      LayerNorm (layer)         sigmoid(x W_1 W_2), dim -> d -> ..   alibi
    minimax       yes      RMS with weight (rms)     sigmoid(u)                           minimax

Source: Qin et al., 2024, arXiv 2405.17381, section 3.4, and 2307.14995. Status: `paper` agrees with the model
code of TransNormerLLM's checkpoints, `official` with OpenNLPLab/lightning-attention's example module,
`minimax` with transformers' MiniMaxLightningAttention. Operations O(T * (dim + C + d) * dim); decoding
O(dim^2), whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import CARRIES_STATE
from regard.attention.lightning.operator import CHUNK, Call
from regard.attention.lightning.rates import check_kind, decay_rates, given_rates
from regard.attention.mechanism import State
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError, ShapeMismatch

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"activation_v": False, "norm": "srms", "gate": "linear", "rates": "alibi"},
    "official": {"activation_v": True, "norm": "layer", "gate": "low_rank_sigmoid", "rates": "alibi"},
    "minimax": {"activation_v": True, "norm": "rms", "gate": "sigmoid", "rates": "minimax"},
}
GATES = ("linear", "sigmoid", "low_rank_sigmoid")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu, "elu": F.elu, "sigmoid": torch.sigmoid,
    "leak": F.leaky_relu, "1+elu": lambda x: 1 + F.elu(x), "2+elu": lambda x: 2 + F.elu(x), "sine": torch.sin,
    "none": lambda x: x,
}  # fmt: skip
NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "srms": lambda dim, heads: nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False),
    "rms": lambda dim, heads: nn.RMSNorm(dim, eps=1e-6),
    "layer": lambda dim, heads: nn.LayerNorm(dim),
    "group": lambda dim, heads: HeadNorm(heads, dim),
}


class HeadNorm(nn.GroupNorm):
    """LayerNorm of every head by itself, [B, T, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class Lrpe(nn.Module):
    """Rotate features by learned angles, the distance between positions alone mattering.

    Args:
        heads: H.
        width: d, of a head.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(initial_angles(heads, width))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return [x cos, x sin], [B, H, T, 2 d], of x [B, H, T, d] at positions int64 [B|1, T]."""
        angles = positions.double()[:, None, :, None] * self.theta.double()
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], -1)


def initial_angles(heads: int, width: int) -> Tensor:
    """Return the angles that LRPE begins with, [heads, 1, width]."""
    count = heads * width
    return 10000 ** (-2 / count * torch.arange(count)).view(heads, 1, width)


class LightningMixer(Block):
    """Gated lightning attention from x to x; the module of `LightningLayer`.

    Args: as the fields of `LightningLayer`, presets resolved.
    """

    causal = True

    def __init__(
        self, *, dim: int, heads: int, width: int, rates: Tensor, activation: str, activation_v: bool,
        norm: str, gate: str, lrpe: bool, bias: bool, chunk_size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.activation, self.activation_v, self.gate = heads, activation, activation_v, gate
        self.chunk_size, self.width = chunk_size, width
        inner = heads * width
        fused = 3 if gate == "low_rank_sigmoid" else 4
        self.qkvu_proj = nn.Linear(dim, fused * inner, bias=bias)
        self.low_rank = None
        if gate == "low_rank_sigmoid":
            self.low_rank = nn.Sequential(
                nn.Linear(dim, width, bias=bias), nn.Linear(width, inner, bias=bias)
            )
        self.norm = NORMS[norm](inner, heads)
        self.lrpe = Lrpe(heads, width) if lrpe else None
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.rates = tuple(rates.tolist())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mixed x [B, T, dim]; mask is bool [B, T], False at padding."""
        return self.step(x, None, mask)[0]

    def step(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only, [B, T, dim].
            state: what this returned before: the recurrent state [B, H, d or 2 d, d], and how many
                positions it has seen, int64 [B]. None at the beginning.
            mask: bool [B, T] of the new positions, False at padding.
        """
        q, k, v, gate, seen = self.parts(x, state, mask)
        rates = given_rates(self.rates, self.heads, x.device)
        call = Call(q, k, v, rates, 1.0, None if state is None else state[0], mask).checked()
        out, last = call.run("chunk", self.chunk_size)
        return self._joined(out, gate), (last, seen)

    def reference(self, x: Tensor) -> Tensor:
        q, k, v, gate, _ = self.parts(x, None, None)
        steps = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
        rates = given_rates(self.rates, self.heads, x.device)
        left = (-rates[:, None, None] * (steps[:, None] - steps).clamp(min=0)).exp().tril()
        return self._joined((q @ k.mT * left.to(q.dtype)) @ v, gate)

    def parts(
        self, x: Tensor, state: State | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k [B, H, T, d or 2 d], v [B, H, T, d], the gate [B, T, H d], and positions seen [B]."""
        if x.ndim != 3 or x.shape[-1] != self.qkvu_proj.in_features:
            raise ShapeMismatch(
                f"x must be [batch, time, {self.qkvu_proj.in_features}], and is {list(x.shape)}."
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ShapeMismatch(f"mask must be bool {list(x.shape[:2])}, and is {list(mask.shape)}.")
        inner = self.heads * self.width
        q, k, v, *u = self.qkvu_proj(x).split(inner, -1)
        act = ACTIVATIONS[self.activation]
        q, k, v = act(q), act(k), act(v) if self.activation_v else v
        q, k, v = (part.unflatten(-1, (self.heads, self.width)).transpose(1, 2) for part in (q, k, v))
        gate = u[0] if self.low_rank is None else self.low_rank(x)
        gate = gate if self.gate == "linear" else gate.sigmoid()
        before = x.new_zeros(x.shape[0], dtype=torch.int64) if state is None else state[1]
        ones = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device) if mask is None else mask.long()
        count = before[:, None] + ones.cumsum(1)
        if self.lrpe is not None:
            q, k = self.lrpe(q, count - 1), self.lrpe(k, count - 1)
        return q, k, v, gate, before + ones.sum(1)

    def _joined(self, heads: Tensor, gate: Tensor) -> Tensor:
        joined: Tensor = self.out_proj(self.norm(heads.transpose(1, 2).flatten(2)) * gate)
        return joined

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.qkvu_proj.in_features, generator=generator, dtype=torch.float64)


@mechanism("lightning-layer")
@dataclass(frozen=True, kw_only=True)
class LightningLayer(Spec):
    """Lightning attention with projections, norm and gate; a causal layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of heads.
        width: d, of a head; None for dim / heads.
        layer, layers: number of the layer, and of layers, for the rates.
        preset: `paper`, `official` or `minimax`; it sets what of the next four is None.
        rates: a kind of `decay_rates`, or one number for each head.
        activation_v: whether v passes through the activation as q and k do.
        norm: `srms`, `rms`, `layer` or `group`.
        gate: `linear`, `sigmoid` or `low_rank_sigmoid`.
        activation: of q and k, one of `ACTIVATIONS`.
        lrpe: whether q and k are rotated by learned angles.
        bias: whether projections have one.
        chunk_size: positions in a chunk.

    Example:
        >>> layer = LightningLayer(dim=32, heads=4, lrpe=True).build()
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    module: ClassVar = LightningMixer
    costs: ClassVar = CARRIES_STATE
    dim: int
    heads: int
    width: int | None = None
    layer: int = 0
    layers: int = 1
    preset: str = "paper"
    rates: str | Sequence[float] | None = None
    activation_v: bool | None = None
    norm: str | None = None
    gate: str | None = None
    activation: str = "silu"
    lrpe: bool = False
    bias: bool = False
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        chosen = (
            ("preset", self.preset, PRESETS),
            ("norm", self.norm, NORMS),
            ("gate", self.gate, GATES),
            ("activation", self.activation, ACTIVATIONS),
        )
        for name, value, known in chosen:
            if value not in known and not (value is None and name in ("norm", "gate")):
                raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        for name in ("dim", "heads", "width", "chunk_size"):
            value = getattr(self, name)
            if value is None and name == "width":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.width is None and self.dim % self.heads:
            raise RegardError(f"dim is {self.dim}, which {self.heads} heads do not divide; give width=.")
        if self.rates is not None and not isinstance(self.rates, str):
            object.__setattr__(self, "rates", tuple(float(rate) for rate in self.rates))
        self.rates_of_heads()

    def rates_of_heads(self) -> Tensor:
        """Return the rate of each head, float64 [heads]."""
        rates = self._option("rates")
        if isinstance(rates, str):
            check_kind(rates)
            return decay_rates(self.heads, self.layer, self.layers, rates)
        return given_rates(rates, self.heads, torch.device("cpu"))

    def _option(self, name: str) -> Any:
        value = getattr(self, name)
        return PRESETS[self.preset][name] if value is None else value

    def build(self, site: Any = None) -> LightningMixer:
        return LightningMixer(
            dim=self.dim, heads=self.heads, width=self.width or self.dim // self.heads,
            rates=self.rates_of_heads(), activation=self.activation,
            activation_v=self._option("activation_v"), norm=self._option("norm"), gate=self._option("gate"),
            lrpe=self.lrpe, bias=self.bias, chunk_size=self.chunk_size,
        )  # fmt: skip

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(dim=12, heads=3, layer=1, layers=4, lrpe=True),
            cls(dim=12, heads=3, layer=1, layers=4, preset="official", bias=True),
            cls(dim=12, heads=3, layer=1, layers=4, preset="minimax", width=5),
            cls(dim=8, heads=2, rates=(0.0, 2.5), norm="group"),
        )
