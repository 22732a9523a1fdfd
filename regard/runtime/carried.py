"""A cache layer for mechanisms that carry a state instead of keys and values, and how it gets into a cache.

A hook before an attention module's forward puts a `StateLayer` where the module will look for its layer of
the cache. Whatever reorders, selects or resets the cache then does so with the state. Where the layer holds
keys and values already, because the model ran before without the mechanism, they are turned into a state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.mask import LazyMask

State = tuple[Tensor, ...]
Absorb = Callable[[Tensor, Tensor, Tensor | None], State]

_HELD: weakref.WeakKeyDictionary[nn.Module, StateLayer] = weakref.WeakKeyDictionary()


class StateLayer(CacheLayerMixin):
    """One layer of a cache, holding the state of a mechanism.

    `update` hands the new keys and values through; the mechanism takes `state`, tensors with the batch
    first, and sets the new one. It cannot be cropped, so assisted decoding is refused.

    Attributes:
        owner: name of the mechanism, for messages.
        state: None before the first position.
        length: number of positions in the state, padding counted.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.state: State | None = None
        self.length = 0
        self.expected = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.expected:
            raise RegardError(
                f"This cache holds the state of {self.owner}, which was swapped into the layer and is no "
                "longer there; start again with a new cache."
            )
        self.expected = False
        self.is_initialized = True
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedModel(
            f"{self.owner} decodes from a state, from which positions cannot be taken back; generate "
            "without an assistant."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """A state is small, and stays on its device."""

    def prefetch(self) -> None:
        """A state is never offloaded."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = tuple(change(x) for x in self.state)


def held(module: nn.Module) -> StateLayer | None:
    """Return the layer that the current call of an attention module keeps its state in."""
    return _HELD.get(module)


def carry(module: nn.Module, owner: str, absorb: Absorb, route: str = "interface") -> RemovableHandle:
    """Let an attention module keep a state in whatever cache it is given.

    Args:
        module: a causal self-attention module with a `layer_idx`.
        owner: name of the mechanism.
        absorb: turns keys [B, Hkv, S, D], values [B, Hkv, S, Dv] and valid [B, S] or None into a state.
        route: of the module's site.

    Returns:
        A handle; `remove()` undoes it.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        cache = next((x for x in given if isinstance(x, Cache | EncoderDecoderCache)), None)
        _HELD.pop(module, None)
        if cache is None:
            return
        if route != "interface":
            raise UnsupportedModel(
                f"{type(module).__name__} calls scaled_dot_product_attention itself, so {owner} cannot "
                "keep a state in its cache; run it with use_cache=False."
            )
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        mask = next((x for x in given if isinstance(x, LazyMask)), None)
        layer = _placed(cache, int(module.layer_idx), owner, absorb, mask)  # type: ignore[arg-type]
        layer.expected = True
        _HELD[module] = layer

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def release(module: nn.Module) -> None:
    """Forget the layer of the last call."""
    _HELD.pop(module, None)


def _placed(cache: Cache, index: int, owner: str, absorb: Absorb, mask: LazyMask | None) -> StateLayer:
    """The state layer of a cache at `index`, put there where another one is."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[index]
    if isinstance(old, StateLayer):
        if old.owner != owner:
            raise RegardError(f"This cache holds the state of {old.owner}, and {owner} cannot read it.")
        return old
    if type(old) is not DynamicLayer:
        raise UnsupportedModel(
            f"{owner} carries a state, and can keep it in a dynamic cache of full attention only; layer "
            f"{index} of this cache is a {type(old).__name__}."
        )
    new = StateLayer(owner)
    length = old.get_seq_length()
    if length:
        assert old.keys is not None and old.values is not None
        padding = None if mask is None else mask.padding
        with torch.no_grad():
            new.state = absorb(old.keys, old.values, None if padding is None else padding[:, :length])
        new.length, new.is_initialized = length, True
    cache.layers[index] = new
    return new
