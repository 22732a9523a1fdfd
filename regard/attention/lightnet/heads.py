"""LightNet: linear attention whose keys are a softmax over the sequence, one for each channel.

    A_ts = scale * sum_c f(q_tc) exp(k_sc - z_tc),   z_tc = log sum_{s seen by t} exp(k_sc)

with f = SiLU, the layer's own activation of queries. Rows do not sum to 1, and weights may be negative. It is
a mechanism to train with: what a pretrained softmax model has learned does not fit it.

Source: Qin et al., 2024, arXiv 2405.21022. Status: the recurrence agrees with flash-linear-attention's layer
(`preset="fla"`), and with the first author's later code (`preset="xmixers"`). The paper's own repository
could not be had. Operations and memory O(T * D * Dv); decoding costs O(D * Dv) a token, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.rows import over_channels
from regard.attention.lightnet.additive import absorb, empty, piece_of, running
from regard.attention.lightnet.function import lightnet_attention
from regard.attention.matrices import dense_mask
from regard.attention.mechanism import Context, Mechanism, State
from regard.attention.registry import Spec, mechanism
from regard.engines.rows import expand_heads
from regard.errors import RegardError, ShapeMismatch

PRESETS = ("paper", "fla", "xmixers")
ACTIVATIONS = ("silu", "none")


class LightNetHeads(Mechanism):
    """LightNet's mixing of positions; the module of `LightNet`."""

    carries_state = True
    honours = frozenset({"softcap"})

    def __init__(self, preset: str, activation: str) -> None:
        super().__init__()
        self.preset, self.activation = preset, activation

    def queries(self, q: Tensor) -> Tensor:
        """Return scale * f(q), float32 or float64."""
        q = q if q.dtype == torch.float64 else q.float()
        q = F.silu(q) if self.activation == "silu" else q
        return q * q.shape[-1] ** -0.5 if self.preset == "fla" else q

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        queries = self.queries(q)
        logits, mask = expand_heads(k, q.shape[1]).to(queries.dtype), dense_mask(ctx, q.device)
        seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        weights = queries.new_zeros(*q.shape[:3], k.shape[2])
        for c in range(q.shape[3]):
            row = logits[:, :, None, :, c].masked_fill(~seen, -torch.inf)
            if self.preset == "xmixers":
                row = F.pad(row, (0, 1), value=0.0)
            share = torch.where(seen, row.softmax(-1)[..., : k.shape[2]], 0.0)
            weights = weights + queries[..., c, None] * share
        return weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        queries, state = self.queries(q), self._empty(q, k, v)
        if not ctx.causal:
            last = absorb(piece_of(queries, k, v, ctx.valid_keys), state)
            return (queries @ expand_heads(last[0], q.shape[1])).to(q.dtype)
        start, stop = ctx.offset, ctx.offset + q.shape[2]
        valid = ctx.valid_keys
        if start:
            early = None if valid is None else valid[:, :start]
            state = absorb(piece_of(queries, k[:, :, :start], v[:, :, :start], early), state)
        late = None if valid is None else valid[:, start:stop]
        keys, values = k[:, :, start:stop], v[:, :, start:stop]
        out, _ = lightnet_attention(queries, keys, values, causal=True, valid=late, state=state)
        return out.to(q.dtype)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        valid = self.context(q, k, ctx).valid_keys
        queries = self.queries(q)
        state = self._empty(q, k, v) if state is None else state
        if len(state) != 2:
            raise ShapeMismatch(f"LightNet's state is the pair (S, z), and {len(state)} tensors were given.")
        out, new = lightnet_attention(queries, k, v, causal=True, valid=valid, state=(state[0], state[1]))
        return out.to(q.dtype), new

    def absorb(self, k: Tensor, v: Tensor, heads: int, ctx: Context | None = None) -> State:
        valid = None if ctx is None else ctx.valid_keys
        return absorb(piece_of(k, k, v, valid), self._empty(k, k, v))

    def _empty(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the first position; xmixers begins with z = 0, one more in every sum."""
        S, z = empty(q, k, v, angles=False)
        return S, torch.zeros_like(z) if self.preset == "xmixers" else z


@system_of(LightNetHeads)
def system(mixer: LightNetHeads, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[LTV, Tensor]:
    """Return LightNet as a linear time-varying system, and the values of every query head."""
    queries = mixer.queries(q)
    keys, values = (expand_heads(x, q.shape[1]).to(queries.dtype) for x in (k, v))
    piece = piece_of(queries, keys, values, mixer.context(q, k, ctx).valid_keys)
    before = mixer._empty(queries, keys, values)[1]
    z = running(piece.k, before)
    decay = torch.cat([before[:, :, None], z[:, :, :-1]], 2) - z
    width = v.shape[-1]
    lam = decay.exp()[..., None, :].expand(*decay.shape[:-1], width, -1).flatten(-2)
    written = (piece.k - z).exp()
    if piece.valid is not None:
        written = written * piece.valid[:, None, :, None]
    return LTV(lam, over_channels(written, width), over_channels(queries, width).mT), values


@mechanism("lightnet")
@dataclass(frozen=True)
class LightNet(Spec):
    """Linear attention with a softmax of the keys over the sequence; it decodes from a state of fixed size.

    Attributes:
        preset: `paper`, scale 1; `fla`, scale 1 / sqrt(D) as flash-linear-attention has it; `xmixers`,
            scale 1 and a running sum that begins at 1, as the first author's later code has it.
        activation: of queries, `silu`, or `none` where they have theirs already.
    """

    module: ClassVar = LightNetHeads
    preset: str = "paper"
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("preset", self.preset, PRESETS), ("activation", self.activation, ACTIVATIONS),
        ):  # fmt: skip
            if value not in allowed:
                raise RegardError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (cls(), cls(preset="fla"), cls(preset="xmixers", activation="none"))
