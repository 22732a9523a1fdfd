"""Kernel attention: the product of features of query and key, with or without normalisation.

    A_ij = scale * phi(q_i) . phi(k_j)  over visible keys j
    phi = elu + 1, the identity, or W2 relu(W1 x), shared by q and k
    normalised:  A_ij / (sum_l A_il + 1e-8) for elu + 1;  A_ij / max(|sum_l A_il|, 1) for the others
    S_i = S_{i-1} + phi(k_i) [v_i, 1]^T                           the state, [D, Dv + 1]

Without normalisation no attention sink emerges in the paper's training; with elu + 1 and normalisation one
does. Weights of the identity and the learned kernel may be negative: `Sinks(proxy=True)` measures them.

Source: Gu et al., 2024, arXiv 2410.10781, on attention operations. Status: agrees with the official code
(sail-sg/Attention-Sink, `lit_gpt/model_attn_kernel.py`), which forms the matrix; here it is scanned.
Operations and memory O(T * D * Dv); decoding costs O(D * Dv) a token, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.checks import refuse_nan
from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.rows import normalized_attention
from regard.attention.matrices import dense_mask
from regard.attention.mechanism import Context, Mechanism, State
from regard.attention.registry import Spec, mechanism
from regard.attention.widths import key_width
from regard.engines.masks import unhidden
from regard.engines.rows import expand_heads
from regard.engines.scan import scan
from regard.errors import RegardError, ShapeMismatch

FEATURES, TINY = ("elu", "identity", "mlp"), 1e-8


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: str = "elu",
    normalise: bool = False,
    causal: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Return attention by a kernel without parameters.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        feature: "elu" for elu + 1, or "identity"; the learned one needs a module, `Kernel(feature="mlp")`.
        normalise: divide each row by its sum, see above.
        causal: whether a row sees no later key.
        valid: bool [B, S], False at padding.

    Returns:
        [B, H, T, Dv], in the dtype of q.

    Raises:
        RegardError: for a feature that is not known, or has parameters.
        ShapeMismatch: where q, k and valid do not fit.

    Example:
        >>> q = k = torch.ones(1, 1, 3, 4)
        >>> kernel_attention(q, k, torch.ones(1, 1, 3, 1), feature="identity").flatten()
        tensor([2., 4., 6.])
    """
    if feature == "mlp":
        raise RegardError('feature "mlp" has parameters: build Kernel(feature="mlp", width=...) and call it.')
    refuse_nan(q=q, k=k, v=v)
    layer = Kernel(feature=feature, normalise=normalise).build()
    return layer(q, k, v, Context.of(q, k, causal=causal, valid=valid))


class KernelAttention(Mechanism):
    """Attention by a kernel; the module of `Kernel`."""

    carries_state = True
    honours = frozenset({"softcap"})

    def __init__(self, feature: str, normalise: bool, width: int | None) -> None:
        super().__init__()
        self.feature, self.normalise, self.width = feature, normalise, width
        if width is not None:
            self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def features(self, x: Tensor) -> Tensor:
        """Return phi(x), in float32 or, from float64, float64.

        Raises:
            ShapeMismatch: where x is not as wide as the learned kernel.
        """
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.feature == "identity":
            return x.to(kind)
        if self.feature == "elu":
            return F.elu(x.to(kind)) + 1
        if x.shape[-1] != self.width:
            raise ShapeMismatch(f"heads are {x.shape[-1]} wide, and the kernel was built for {self.width}.")
        hidden = F.linear(x.to(kind), self.first.weight.to(kind)).relu()
        return F.linear(hidden, self.second.weight.to(kind))

    def normaliser(self, total: Tensor) -> Tensor:
        """Return what a row with this sum of weights is divided by."""
        return total + TINY if self.feature == "elu" else total.abs().clamp_min(1)

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        keys = expand_heads(self.features(k), q.shape[1])
        weights = self.queries(q, ctx) @ keys.transpose(-1, -2)
        mask = dense_mask(ctx, q.device)
        weights = weights if mask is None else weights * unhidden(mask)
        return weights / self.normaliser(weights.sum(-1, keepdim=True)) if self.normalise else weights

    def queries(self, q: Tensor, ctx: Context) -> Tensor:
        """Return scale * phi(q)."""
        return self.features(q) * (q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale)

    def written(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return the features of the keys, zero at padding, and the values with a column of ones."""
        keys = self.features(k)
        if ctx.valid_keys is not None:
            keys = keys * ctx.valid_keys[:, None, :, None]
        return keys, F.pad(v.to(keys.dtype), (0, 1), value=1.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        queries, (keys, values) = self.queries(q, ctx), self.written(k, v, ctx)
        if not ctx.causal:
            state = keys.transpose(-1, -2) @ values
            return self._read(queries @ expand_heads(state, q.shape[1]), q.dtype)
        start, stop = ctx.offset, ctx.offset + q.shape[2]
        before = keys[:, :, :start].transpose(-1, -2) @ values[:, :, :start]
        out, _ = scan(queries, keys[:, :, start:stop], values[:, :, start:stop], state=before)
        return self._read(out, q.dtype)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        ctx = self.context(q, k, ctx)
        keys, values = self.written(k, v, ctx)
        out, new = scan(self.queries(q, ctx), keys, values, state=None if state is None else state[0])
        return self._read(out, q.dtype), (new,)

    def _read(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        heads, total = out[..., :-1], out[..., -1:]
        return (heads / self.normaliser(total) if self.normalise else heads).to(dtype)

    def extra_repr(self) -> str:
        return f"feature={self.feature!r}, normalise={self.normalise}"


@system_of(KernelAttention)
def system(mixer: KernelAttention, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[LTV, Tensor]:
    """Return kernel attention as a linear time-varying system, and the values of every query head."""
    ctx = mixer.context(q, k, ctx)
    keys, values = (expand_heads(x, q.shape[1]) for x in mixer.written(k, v, ctx))
    queries = mixer.queries(q, ctx)
    total = (queries * keys.cumsum(2)).sum(-1)
    eta = mixer.normaliser(total) if mixer.normalise else torch.ones_like(total)
    return normalized_attention(queries, keys, eta, v.shape[-1]), values[..., :-1]


@mechanism("kernel")
@dataclass(frozen=True, kw_only=True)
class Kernel(Spec):
    """Attention by a kernel, linear in the length; not normalised, no sink emerges.

    Attributes:
        feature: "elu" for elu + 1, "identity", or "mlp", which is learned.
        normalise: divide each row by its sum, see above.
        width: of a head's queries and keys, where the kernel is learned; in a pretrained model the layer's.

    Example:
        >>> Kernel(feature="mlp", width=16).build()
        KernelAttention(
          feature='mlp', normalise=False
          (first): Linear(in_features=16, out_features=16, bias=False)
          (second): Linear(in_features=16, out_features=16, bias=False)
        )
    """

    module: ClassVar = KernelAttention
    feature: str = "elu"
    normalise: bool = False
    width: int | None = None

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            raise RegardError(f"feature is {self.feature!r}; it must be one of {', '.join(FEATURES)}.")
        if self.width is not None and self.feature != "mlp":
            raise RegardError(f"width goes with feature 'mlp', and feature is {self.feature!r}.")

    def build(self, site: Any = None) -> KernelAttention:
        width = self.width
        if self.feature == "mlp":
            width = key_width(self, self.width, site)
        return KernelAttention(self.feature, self.normalise, width)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        kinds = [cls(feature=f, normalise=n) for f in ("elu", "identity") for n in (False, True)]
        return *kinds, cls(feature="mlp", width=8), cls(feature="mlp", width=8, normalise=True)
