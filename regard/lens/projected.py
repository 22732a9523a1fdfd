"""Norms after the output projection, without applying it.

    || W_h x ||^2 = x^T (W_h^T W_h) x

with W_h [D_model, Dv] the part of the output projection that head h is mapped by. The Gram matrix
[Dv, Dv] of each head is computed once, so that a norm costs Dv^2 rather than D_model * Dv.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import ShapeMismatch
from regard.runtime.anatomy import Anatomy
from regard.runtime.anatomy.parts import gram
from regard.runtime.call import Call

ROWS = 1024
_GRAMS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor]] = weakref.WeakKeyDictionary()


def head_grams(anatomy: Anatomy, call: Call) -> Tensor:
    """Return W_h^T W_h of a call's site, float32 [H, Dv, Dv]; kept until the projection changes.

    Raises:
        UnsupportedModel: where the site has no output projection that can be read.
        ShapeMismatch: where the projection does not take the heads' outputs as they are.
    """
    projection = anatomy.output_projection(call.site)
    stamp = tuple((p.data_ptr(), p._version, p.device) for p in projection.parameters())
    known = _GRAMS.get(projection)
    if known is None or known[0] != stamp:
        known = stamp, gram(anatomy.output_weight(call.site, call.heads))
        _GRAMS[projection] = known
    grams = known[1]
    if grams.shape[1] != call.v.shape[-1]:
        raise ShapeMismatch(
            f"the output projection of {call.site.alias} takes {grams.shape[1]} numbers a head, and the "
            f"values have {call.v.shape[-1]}."
        )
    return grams


def projected_norms(x: Tensor, grams: Tensor) -> Tensor:
    """Return || W_h x || of every head, float32 [B, H, T].

    Args:
        x: [B, H or Hkv, T, Dv]; with fewer heads than `grams`, each serves a group of query heads.
        grams: [H, Dv, Dv].
    """
    batch, own, length, dim = x.shape
    grouped = grams.view(own, len(grams) // own, dim, dim)
    out = torch.zeros(batch, len(grams), length, device=x.device)
    for start in range(0, length, ROWS):
        part = x[:, :, None, start : start + ROWS].float()
        square = (part @ grouped).mul_(part).sum(-1)
        out[:, :, start : start + ROWS] = square.flatten(1, 2).clamp_min_(0).sqrt_()
    return out
