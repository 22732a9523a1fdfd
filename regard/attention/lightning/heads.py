"""Lightning Attention as a mechanism: the operator on the queries, keys and values of a layer.

    A_ij = scale * (q_i . k_j) exp(-s (n_i - n_j))    for keys j up to row i

where n counts the positions that are not padding. It forms no scores, so a model's own scale, soft-cap and
dropout on weights do not apply; masks besides causal order and padding are refused.

Source, status and costs: `regard.attention.lightning.operator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.rows import over_channels
from regard.attention.lightning.operator import CHUNK, Call
from regard.attention.lightning.rates import check_kind, decay_rates, given_rates
from regard.attention.matrices import dense_mask
from regard.attention.mechanism import Context, Mechanism, State
from regard.attention.registry import Spec, mechanism
from regard.engines.rows import expand_heads
from regard.errors import RegardError


class LightningHeads(Mechanism):
    """Lightning Attention; the module of `LightningAttention`.

    Args:
        rates: a kind of `decay_rates`, or the rate of each head.
        layer, layers: for kinds that depend on them.
        scale: factor on q k^T.
        chunk_size: positions in a chunk.
    """

    carries_state = True
    honours = frozenset({"softcap"})
    orders = frozenset({"causal"})

    def __init__(
        self, rates: str | tuple[float, ...], layer: int, layers: int, scale: float, chunk_size: int
    ) -> None:
        super().__init__()
        self.rates, self.layer, self.layers = rates, layer, layers
        self.scale, self.chunk_size = scale, chunk_size

    def rates_of(self, heads: int, device: torch.device) -> Tensor:
        """Return the rate of each of so many heads, float64 [heads]."""
        if isinstance(self.rates, str):
            return decay_rates(heads, self.layer, self.layers, self.rates).to(device)
        return given_rates(self.rates, heads, device)

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        similar = self.scale * q.to(kind) @ expand_heads(k, q.shape[1]).to(kind).mT
        ages = _ages(k, ctx)
        rows = ages[:, :, ctx.offset : ctx.offset + q.shape[2]]
        apart = (rows[..., None] - ages[:, :, None]).clamp(min=0)
        left = (-self.rates_of(q.shape[1], q.device)[:, None, None] * apart).exp().to(kind)
        mask = dense_mask(ctx, q.device)
        if mask is None:
            return similar * left
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return torch.where(visible, similar * left, 0.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        start, stop = ctx.offset, ctx.offset + q.shape[2]
        state = self._state_of(k[:, :, :start], v[:, :, :start], q.shape[1], ctx) if start else None
        return self._run(q, k[:, :, start:stop], v[:, :, start:stop], state, _valid(ctx, start, stop))[0]

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        ctx = self.context(q, k, ctx)
        out, new = self._run(q, k, v, None if state is None else state[0], ctx.valid_keys)
        return out, (new,)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rates = self.rates_of(q.shape[1], q.device)
        call = Call(q, k, v, rates, self.scale, state, valid).checked()
        return call.run("chunk", self.chunk_size)

    def _state_of(self, k: Tensor, v: Tensor, heads: int, ctx: Context) -> Tensor:
        """The state after keys before the first query, [B, H, D, Dv]."""
        kind = torch.float64 if k.dtype == torch.float64 else torch.float32
        ages = _ages(k, ctx)[:, :, : k.shape[2]]
        left = (-self.rates_of(heads, k.device)[:, None] * (ages[:, :, -1:] - ages)).exp().to(kind)
        valid = _valid(ctx, 0, k.shape[2])
        if valid is not None:
            left = left * valid[:, None]
        return (left[..., None] * expand_heads(k, heads)).mT @ expand_heads(v, heads).to(kind)


@system_of(LightningHeads)
def system(mixer: LightningHeads, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[LTV, Tensor]:
    """Return lightning attention as a linear time-varying system, and the values of every query head."""
    mixer.context(q, k, ctx)
    keys, values = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    kept = (-mixer.rates_of(q.shape[1], q.device)).exp().to(q.dtype)
    kept = kept[:, None].expand(*q.shape[:3])
    if ctx.valid_keys is not None:
        keys = keys * ctx.valid_keys[:, None, :, None]
        kept = torch.where(ctx.valid_keys[:, None], kept, 1.0)
    width = v.shape[-1]
    lam = kept[..., None].expand(*kept.shape, width * k.shape[-1])
    return LTV(lam, over_channels(keys, width), over_channels(mixer.scale * q, width).mT), values


def _valid(ctx: Context, start: int, stop: int) -> Tensor | None:
    return None if ctx.valid_keys is None else ctx.valid_keys[:, start:stop]


def _ages(k: Tensor, ctx: Context) -> Tensor:
    """n, how many positions that are not padding there are up to each key, float64 [B|1, 1, S]."""
    if ctx.valid_keys is None:
        return torch.arange(k.shape[2], dtype=torch.float64, device=k.device)[None, None]
    return ctx.valid_keys.double().cumsum(-1)[:, None]


@mechanism("lightning-attention")
@dataclass(frozen=True, kw_only=True)
class LightningAttention(Spec):
    """Causal linear attention with a fixed exponential decay a head; it decodes from a state of fixed size.

    Attributes:
        rates: how fast heads forget, a kind of `decay_rates`, or one number for each head.
        layer: number of the layer; None for that of the site it is built for, or 0.
        layers: number of layers; None for the site's model's, or just enough.
        scale: factor on q k^T.
        chunk_size: positions in a chunk; near the width of a head is fastest.

    Example:
        >>> LightningAttention(rates="paper", layer=1, layers=12).build().rates_of(2, torch.device("cpu"))
        tensor([0.0000, 3.6667], dtype=torch.float64)
    """

    module: ClassVar = LightningHeads
    rates: str | Sequence[float] = "alibi"
    layer: int | None = None
    layers: int | None = None
    scale: float = 1.0
    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        if isinstance(self.rates, str):
            check_kind(self.rates)
        else:
            object.__setattr__(self, "rates", tuple(float(rate) for rate in self.rates))
            given_rates(self.rates, len(self.rates), torch.device("cpu"))
        for name, value, least in (
            ("layer", self.layer, 0),
            ("layers", self.layers, 1),
            ("chunk_size", self.chunk_size, 1),
        ):
            if value is None and name != "chunk_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
        if self.layer is not None and self.layers is not None and self.layer >= self.layers:
            raise RegardError(f"layer is {self.layer}, and there are {self.layers} layers, counted from 0.")

    def build(self, site: Any = None) -> LightningHeads:
        layer = self.layer if self.layer is not None else getattr(site, "layer", 0)
        module = getattr(site, "module", None)
        told = getattr(getattr(module, "config", None), "num_hidden_layers", getattr(module, "layers", None))
        layers = self.layers if self.layers is not None else told
        if layers is None and site is not None and self.rates != "none" and isinstance(self.rates, str):
            raise RegardError(
                f"{site!r} does not say how many layers there are, on which the rates {self.rates!r} depend; "
                "give layers=."
            )
        rates = self.rates if isinstance(self.rates, str) else tuple(self.rates)
        return LightningHeads(rates, layer, max(layers or 0, layer + 1), self.scale, self.chunk_size)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return cls(), cls(rates="paper", layer=1, layers=3, scale=0.5), cls(rates="none", chunk_size=7)
