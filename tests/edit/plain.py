"""Attention on whole matrices, written out apart from regard, with places to change it by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

Change = Callable[[int, Tensor, Any], Tensor]


@contextmanager
def changed(model: Any, scores: Change | None = None, weights: Change | None = None):
    """Let `model` compute attention as a plain softmax, changed at two stages.

    Args:
        model: a tiny model that calls transformers' attention interface.
        scores: (layer, scores [B, H, T, S], module) -> new scores, masked already.
        weights: (layer, weights [B, H, T, S], module) -> new weights.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **_):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        found = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            found = found + attention_mask[..., : key.shape[2]]
        if scores is not None:
            found = scores(module.layer_idx, found, module)
        if s_aux is not None:
            sink = s_aux.view(1, -1, 1, 1).expand(*found.shape[:3], 1)
            found = torch.cat([found, sink], -1).softmax(-1)[..., :-1]
        else:
            found = found.softmax(-1)
        if weights is not None:
            found = weights(module.layer_idx, found, module)
        return (found @ value).transpose(1, 2).contiguous(), found

    AttentionInterface.register("plain-changed", attention)
    AttentionMaskInterface.register("plain-changed", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("plain-changed")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the logits [B, T, V] of the real positions, the others 0."""
    with torch.no_grad():
        found = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return found if mask is None or mask.shape != found.shape[:2] else found * mask[:, :, None]


def visible(inputs: dict[str, Any]) -> Tensor:
    """Return which keys each position may see under causal order and padding, bool [B, 1, T, T]."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    order = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    return (order & mask[:, None, :])[:, None]


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    """Whether two tensors agree to a share of the largest number."""
    assert torch.isfinite(found).all()
    return bool((found - expected).abs().max() <= relative * expected.abs().max())
