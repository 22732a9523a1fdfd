"""What models that carry a state instead of keys and values share: their place in a cache, and padding."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from regard.errors import ShapeMismatch, UnsupportedModel
from regard.runtime.carried import StateLayer


def state_layer(cache: Cache, index: int, owner: str) -> StateLayer:
    """Return the layer of a cache that holds a state, putting it where an empty one stands.

    Args:
        cache: a dynamic cache.
        index: of the layer.
        owner: name of the model, for messages.

    Raises:
        UnsupportedModel: for a cache of keys and values, or one of fixed length.
    """
    while len(cache.layers) <= index and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    old = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(old, StateLayer):
        return old
    if old is None or type(old) is not DynamicLayer or old.get_seq_length():
        raise UnsupportedModel(
            f"{owner} keeps a state of fixed size, for which an empty dynamic cache has room; layer {index} "
            f"of this {type(cache).__name__} is a {type(old).__name__}. Leave past_key_values and "
            "cache_implementation out."
        )
    new = cache.layers[index] = StateLayer(owner)
    return new


def valid_positions(given: Tensor | None, x: Tensor, cache: Cache | None, owner: str) -> Tensor | None:
    """Return which new positions are not padding, bool [B, T], or None where all are.

    Args:
        given: the attention mask, [B, T] or [B, all positions], 0 at padding, or None.
        x: the new positions, [B, T, dim].
        cache: of the positions before, or None.
        owner: name of the model, for messages.

    Raises:
        UnsupportedModel: for a mask of pairs of positions.
        ShapeMismatch: for one of another length.
    """
    if given is None:
        return None
    if given.ndim != 2:
        raise UnsupportedModel(
            f"attention_mask is {list(given.shape)}; {owner} forms no scores and cannot honour an arbitrary "
            "mask, only padding, [batch, time]."
        )
    before = 0 if cache is None else cache.get_seq_length()
    if given.shape[0] != x.shape[0] or given.shape[1] not in (x.shape[1], before + x.shape[1]):
        raise ShapeMismatch(
            f"attention_mask is {list(given.shape)}; it must be {[x.shape[0], before + x.shape[1]]}."
        )
    valid = given[:, given.shape[1] - x.shape[1] :].bool()
    return None if bool(valid.all()) else valid
