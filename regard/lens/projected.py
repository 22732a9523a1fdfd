"""Norms after the output projection, without applying it.

    W_h = Q_h R_h       || W_h x || = || R_h x ||        Q_h has orthonormal columns

with W_h [D_model, Dv] the part of the output projection that head h is mapped by. The factor R_h [Dv, Dv]
of each head is computed once, so that a norm costs Dv^2 rather than D_model * Dv.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from regard.engines.buffers import Buffers
from regard.errors import ShapeMismatch
from regard.lens.visible import per_forward
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call

ROWS = 1024
_FACTORS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def _known_factors(anatomy: Anatomy, call: Call) -> Tensor:
    """Return the factors of a call's site, looked up once a forward."""
    store, key = per_forward(call.run), ("factors", call.site.alias)
    if key not in store:
        store[key] = head_factors(anatomy, call)
    return store[key]


def head_factors(anatomy: Anatomy, call: Call) -> Tensor:
    """Return R_h^T of a call's site, float32 [H, Dv, r], r <= Dv; kept until the projection changes.

    Raises:
        UnsupportedModel: where the site has no output projection that can be read.
        ShapeMismatch: where the projection does not take the heads' outputs as they are.
    """
    projection = anatomy.output_projection(call.site)
    stamp = tuple((p.data_ptr(), p._version, p.device) for p in projection.parameters())
    known = _FACTORS.get(projection)
    if known is None or known[0] != stamp:
        known = stamp, _factors(anatomy.output_weight(call.site, call.heads))
        _FACTORS[projection] = known
    factors = known[1]
    if factors.shape[1] != call.v.shape[-1]:
        raise ShapeMismatch(
            f"the output projection of {call.site.alias} takes {factors.shape[1]} numbers a head, and the "
            f"values have {call.v.shape[-1]}."
        )
    return factors


def _factors(weight: Tensor) -> Tensor:
    """Return R_h^T of every head of an output weight [D, H, Dv], float32 [H, Dv, min(D, Dv)]."""
    return torch.linalg.qr(weight.detach().float().transpose(0, 1), mode="r").R.transpose(1, 2)


def projected_norms(x: Tensor, anatomy: Anatomy, call: Call) -> Tensor:
    """Return || W_h x || of every head of a call's site, float32 [B, H, T].

    Args:
        x: [B, H or Hkv, T, Dv]; where it has fewer heads than the site, each serves a group of query heads.
        anatomy: of the model.
        call: the call that x is of.

    Raises:
        UnsupportedModel, ShapeMismatch: as `head_factors`.
    """
    factors = _known_factors(anatomy, call)
    batch, own, length, dim = x.shape
    group = len(factors) // own
    beside = factors.unflatten(0, (own, group)).transpose(1, 2).reshape(own, dim, -1)
    buffers = Buffers(not torch.is_grad_enabled(), x.device, call.run.memory)
    out = torch.empty(batch, own, group, length, device=x.device)
    for start in range(0, length, ROWS):
        part = x[:, :, start : start + ROWS].float()
        shape = (batch, own, part.shape[2], beside.shape[2])
        mapped = torch.matmul(part, beside, out=buffers.get("projected", shape))
        norms = torch.linalg.vector_norm(mapped.unflatten(-1, (group, -1)), dim=-1)
        out[..., start : start + ROWS] = norms.transpose(2, 3)
    return out.flatten(1, 2)
