"""The keys and values of tokens that stay as they are, so that only the tokens after them are run.

What comes later in a causal model moves nothing earlier. A forward that differs from another one from some
position on therefore needs that position and those after it alone, beside the cache of what is before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from regard.errors import RegardError, UnsupportedModel


class FixedLayer(CacheLayerMixin):
    """A layer of a cache that hands out its keys and values before the new ones, and keeps none of these.

    Args:
        keys, values: of the prefix, [B, Hkv, P, D].
        repeats: how often the B sequences are repeated: row `r * B + b` is sequence b.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, keys: Tensor, values: Tensor, repeats: int = 1) -> None:
        super().__init__()
        self.keys, self.values, self.repeats = keys, values, repeats
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to initialize."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        before = (x.repeat(self.repeats, 1, 1, 1) for x in (self.keys, self.values))
        keys, values = (torch.cat(pair, 2) for pair in zip(before, (key_states, value_states), strict=True))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


class FixedCache(Cache):
    """A cache of `FixedLayer`s."""

    def repeated(self, times: int) -> FixedCache:
        """Return the same prefix for the batch `times` over."""
        layers = [layer for layer in self.layers if isinstance(layer, FixedLayer)]
        return FixedCache(layers=[FixedLayer(x.keys, x.values, x.repeats * times) for x in layers])


def prefix_cache(model: nn.Module, output: Any, length: int) -> FixedCache:
    """Return the first `length` positions of the cache that a forward has returned.

    Args:
        model: for the message.
        output: of a forward with `use_cache=True`, over at least so many tokens.

    Raises:
        UnsupportedModel: for a model that keeps anything but keys and values of all positions.
    """
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    name = type(model).__name__
    if not layers:
        raise UnsupportedModel(f"{name} returns no cache of keys and values, and so has no prefix to keep.")
    found = []
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.shape[2] < length:
            raise UnsupportedModel(f"{name} keeps a {type(layer).__name__}, whose prefix cannot be told.")
        found.append(FixedLayer(keys[:, :, :length], values[:, :, :length]))
    return FixedCache(layers=found)


def check_unpadded(inputs: Mapping[str, Any], name: str) -> Tensor:
    """Return the token ids [N, T] of inputs without padding.

    Raises:
        RegardError: where there is padding, or anything but token ids.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise RegardError(f"{name} must have input_ids [N, T].")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise RegardError(f"{name} is padded; give prompts of one length, such as a part of `by_length()`.")
    other = [key for key in inputs if key not in ("input_ids", "attention_mask")]
    if other:
        raise RegardError(f"{name} has {', '.join(other)}; only input_ids are understood.")
    return ids
