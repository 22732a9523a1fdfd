"""What models that carry a state instead of keys and values share: their place in a cache, and padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.carried import StateLayer


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, options: Mapping[str, Any], owner: str
) -> None:
    """Refuse tokens given in both forms or in none, and a call that asks for attention weights.

    Args:
        options: the other keyword arguments of the call.
        owner: name of the model, for messages.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise RegardError("give input_ids or inputs_embeds, and not both.")
    if options.get("output_attentions"):
        raise UnsupportedModel(f"{owner} has no attention weights to return; leave output_attentions out.")


def state_cache(model: Any, given: Cache | None, use_cache: bool | None, owner: str) -> Cache | None:
    """Return a cache with a place for the state of each of a model's layers, or None where none is wanted.

    Args:
        model: with `config`, `layers` and `gradient_checkpointing`, under which training keeps no cache.
        given: what the caller gave; a new dynamic one where it is None.
        use_cache: whether one is wanted; default what the config says.
        owner: name of the model, for messages.
    """
    wanted = model.config.use_cache if use_cache is None else use_cache
    if not wanted or (model.training and model.gradient_checkpointing):
        return None
    cache = DynamicCache(config=model.config) if given is None else given
    for index in range(len(model.layers)):
        state_layer(cache, index, owner)
    return cache


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
            f"{owner} keeps a state of its own, for which an empty dynamic cache has room; layer {index} "
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
