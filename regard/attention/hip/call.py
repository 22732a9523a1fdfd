"""HiP attention as functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from regard.attention.checks import check_call
from regard.attention.hip.heads import HiPAttention, hip_rows, module_of
from regard.attention.hip.looked import looked_at
from regard.attention.hip.spec import HiP
from regard.attention.layout import Layout
from regard.attention.mechanism import Context
from regard.errors import RegardError, ShapeMismatch


@dataclass(frozen=True, eq=False)
class HiPMask:
    """What each block of queries reads besides window and first tokens.

    Attributes:
        index: int64 [B, H, Q, n], key blocks by number, ascending, then -1. Keys are counted without padding.
        layout: where queries and keys stand.
        spec: the options.
    """

    index: Tensor
    layout: Layout
    spec: HiP

    def counts(self) -> Tensor:
        """Return how many key blocks each block of queries reads, int64 [B, H, Q]."""
        return (self.index >= 0).sum(-1)

    def to_dense(self) -> Tensor:
        """Return which keys each row sees in all, bool [B, H, T, S]; none in rows of padding."""
        rows = looked_at(self.index, self.layout, self.spec, self.layout.keys)
        return rows(0, self.layout.queries)


def hip_mask(q: Tensor, k: Tensor, spec: HiP | None = None, *, valid: Tensor | None = None) -> HiPMask:
    """Search which keys each block of queries reads, without gradients.

    Args:
        q: [B, H, T, D], after rotary embedding, the last positions of `k`. Where `spec.window` is 0 every
            query sees all keys instead.
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        spec: default `HiP()`.
        valid: bool [B, S], False at padding; default all valid.

    Raises:
        ShapeMismatch: where the tensors do not fit together, or there are more queries than keys.
        RegardError: for NaN or infinity.

    Example:
        >>> import torch
        >>> q, k = torch.randn(2, 1, 2, 100, 8)
        >>> hip_mask(q, k, HiP(k=16, window=16, query_block=32)).counts()[0, 0].tolist()
        [0, 8, 8, 8]
    """
    spec = HiP() if spec is None else spec
    _check(q, k, k, spec)
    attention, ctx = _context(q, k, spec, valid)
    layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
    chosen = attention.chosen(q, k, ctx, layout)
    return HiPMask(chosen, layout, spec)


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: HiP | None = None,
    *,
    valid: Tensor | None = None,
    mask: HiPMask | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return HiP attention [B, H, T, Dv]; gradients flow to q, k and v through what was found.

    Args:
        q, k, spec, valid: as for `hip_mask`.
        v: [B, Hkv, S, Dv].
        mask: what `hip_mask` has found for this call or, in decoding, at most `spec.refresh` - 1 tokens ago;
            default to search now.
        scale: factor on q k^T; default 1 / sqrt(D).

    Raises:
        ShapeMismatch: where the tensors do not fit together, or there are more queries than keys.
        RegardError: for NaN or infinity.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 100, 8)
        >>> out = hip_attention(q, k, v, HiP(k=100, query_block=32))
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(out, exact, atol=1e-5)
        True
    """
    spec = (HiP() if mask is None else mask.spec) if spec is None else spec
    _check(q, k, v, spec)
    attention, ctx = _context(q, k, spec, valid)
    if mask is None:
        out = attention(q, k, v, replace(ctx, scale=scale))
        return out.to(v.dtype)
    layout = Layout.of(ctx, q.shape[2], k.shape[2], q.device)
    _check_mask(mask, q, layout, spec)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return hip_rows(q, k, v, mask.index, layout, spec, scale).to(v.dtype)


def _context(q: Tensor, k: Tensor, spec: HiP, valid: Tensor | None) -> tuple[HiPAttention, Context]:
    causal = spec.window > 0
    return module_of(spec), Context.of(q, k, causal=causal, valid=valid)


def _check(q: Tensor, k: Tensor, v: Tensor, spec: HiP) -> None:
    if not isinstance(spec, HiP):
        raise RegardError(f"spec is {spec!r}; it must be a HiP, such as HiP(k=512).")
    check_call(q, k, v)


def _check_mask(mask: HiPMask, q: Tensor, layout: Layout, spec: HiP) -> None:
    blocks = -(-q.shape[2] // spec.query_block)
    if mask.spec != spec:
        raise RegardError(f"mask was made with {mask.spec!r}, and spec is {spec!r}.")
    if mask.index.shape[:3] != (*q.shape[:2], blocks):
        raise ShapeMismatch(
            f"mask lists key blocks for [batch, heads, query blocks] {list(mask.index.shape[:3])}, and these "
            f"queries have {[*q.shape[:2], blocks]}."
        )
    age = layout.keys - mask.layout.keys
    if age and (q.shape[2] > 1 or not 0 < age < spec.refresh):
        raise RegardError(
            f"mask was made at {mask.layout.keys} keys, and there are {layout.keys}; in decoding it may be "
            f"{spec.refresh - 1} tokens old, refresh being {spec.refresh}."
        )
