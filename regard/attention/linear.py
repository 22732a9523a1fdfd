"""Linear attention with the feature map elu + 1.

    phi(x) = elu(x) + 1
    A_ij = phi(q_i) . phi(k_j) / sum_l phi(q_i) . phi(k_l)        over the keys that row i may see
    S_i = S_{i-1} + phi(k_i) [v_i, 1]^T                           the state, [D, Dv + 1]
    out_i = (phi(q_i) S_i)[:Dv] / (phi(q_i) S_i)[Dv]

Source: Katharopoulos et al., 2020, arXiv 2006.16236, equations 4 to 12. Status: agrees with the paper;
q and k are not scaled, as there. Positions of padding write nothing, and a row that sees no key gives 0.

It forms no scores, so the model's scale, soft-cap and dropout on weights do not apply. It can order keys
causally or see all of them; windows, image blocks and other masks are refused.

Operations and memory O(T * D * Dv); decoding costs O(D * Dv) a token, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.rows import linear_attention
from regard.attention.matrices import dense_mask
from regard.attention.mechanism import Context, Mechanism, State
from regard.attention.registry import Spec, mechanism
from regard.engines.rows import expand_heads
from regard.engines.scan import scan


class LinearAttentionHeads(Mechanism):
    """Linear attention; the module of `LinearAttention`."""

    carries_state = True
    honours = frozenset({"softcap"})

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        features, keys = _features(q), expand_heads(_features(k), q.shape[1])
        similar = features @ keys.transpose(-1, -2)
        mask = dense_mask(ctx, q.device)
        if mask is not None:
            visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            similar = similar * visible
        return similar / _nonzero(similar.sum(-1, keepdim=True))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        keys, values = _written(k, v, ctx)
        if not ctx.causal:
            state = keys.transpose(-1, -2) @ values
            return _normalised(_features(q) @ expand_heads(state, q.shape[1]), q.dtype)
        start, stop = ctx.offset, ctx.offset + q.shape[2]
        before = keys[:, :, :start].transpose(-1, -2) @ values[:, :, :start]
        out, _ = scan(_features(q), keys[:, :, start:stop], values[:, :, start:stop], state=before)
        return _normalised(out, q.dtype)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        keys, values = _written(k, v, self.context(q, k, ctx))
        out, new = scan(_features(q), keys, values, state=None if state is None else state[0])
        return _normalised(out, q.dtype), (new,)


@system_of(LinearAttentionHeads)
def system(mixer: LinearAttentionHeads, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[LTV, Tensor]:
    """Return linear attention as a linear time-varying system, and the values of every query head."""
    keys, values = _written(k, v, mixer.context(q, k, ctx))
    keys, values = (expand_heads(x, q.shape[1]) for x in (keys, values[..., :-1]))
    return linear_attention(_features(q), keys, v.shape[-1]), values


def _features(x: Tensor) -> Tensor:
    return F.elu(x if x.dtype == torch.float64 else x.float()) + 1


def _written(k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """The features of the keys, zero at padding, and the values with a column of ones."""
    keys = _features(k)
    if ctx.valid_keys is not None:
        keys = keys * ctx.valid_keys[:, None, :, None]
    return keys, F.pad(v.to(keys.dtype), (0, 1), value=1.0)


def _normalised(out: Tensor, dtype: torch.dtype) -> Tensor:
    return (out[..., :-1] / _nonzero(out[..., -1:])).to(dtype)


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


@mechanism("linear")
@dataclass(frozen=True)
class LinearAttention(Spec):
    """Linear attention with the feature map elu + 1; it decodes from a state of fixed size."""

    module: ClassVar = LinearAttentionHeads
