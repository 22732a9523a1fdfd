"""Attention whose heads are weighted token by token, those of weight 0 left out.

    out_bht = g_bth softmax(scale * q_bht k_b^T) v_b           [B, H, T, Dv]

Source: Jin et al., 2024, arXiv 2410.11842, equation 4, before the output projection. The official code
computes every head and multiplies by 0; here the rows of heads that are off are not computed.
"""

from __future__ import annotations

from torch import Tensor

from regard.attention.checks import check_call
from regard.attention.mechanism import Context
from regard.engines.chosen import attend_chosen
from regard.engines.rows import AttentionInputs, attend
from regard.errors import ShapeMismatch


def moh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    causal: bool = True,
    valid: Tensor | None = None,
    sparse: bool = True,
) -> Tensor:
    """Return softmax attention times the gates of heads.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        gates: [B, T, H], such as a `HeadRouter` gives; 0 where a head is off.
        causal: whether a row sees no later key; the rows are then the last of the S positions.
        valid: bool [B, S], False at padding.
        sparse: leave out rows whose gate is 0. The result is the same, but that a gate of 0 gets a gradient
            only where its head is computed.

    Returns:
        [B, H, T, Dv], in the dtype of v.

    Raises:
        ShapeMismatch: where they do not fit together.
        RegardError: where a number is not finite.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> gates = torch.tensor([[[1.0, 0.0]]]).expand(1, 5, 2)
        >>> moh_attention(q, k, v, gates)[:, 1].abs().max()
        tensor(0.)
    """
    check_call(q, k, v)
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if gates.shape != wanted:
        raise ShapeMismatch(
            f"gates must be [batch, time, heads] {list(wanted)}, and are {list(gates.shape)}."
        )
    return weighted(q, k, v, gates, Context.of(q, k, causal=causal, valid=valid), sparse)


def weighted(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, ctx: Context, sparse: bool) -> Tensor:
    """The same for a call whose shapes are known to fit."""
    own, inputs = gates.transpose(1, 2), ctx.inputs(q, k, v)
    out = attend_some(inputs, own.detach() != 0, ctx) if sparse else attend(inputs)
    return out * own[..., None].to(out.dtype)


def attend_some(inputs: AttentionInputs, on: Tensor, ctx: Context) -> Tensor:
    """Return attention [B, H, T, Dv] where `on`, bool [B, H, T], and 0 elsewhere."""
    if not (ctx.causal and ctx.plain):
        return attend_chosen(inputs, on)
    return attend_chosen(inputs, on, offset=ctx.offset, valid=ctx.valid_keys)
