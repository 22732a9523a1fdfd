"""A cache layer for mechanisms that carry a state instead of keys and values, and how it gets into a cache.

A hook before an attention module's forward puts a `StateLayer` where the module will look for its layer of
the cache. Whatever reorders, selects or resets the cache then does so with the state. Where the layer holds
keys and values already, because the model ran before without the mechanism, they are turned into a state.
The hooks are functions that look up who carries, so that a model with them can be copied and pickled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.mask import LazyMask
from regard.runtime.site import Route

State = tuple[Tensor, ...]
Absorb = Callable[[Tensor, Tensor, int, Tensor | None], State]
Serves = Callable[[nn.Module], bool]


class StateLayer(CacheLayerMixin):
    """One layer of a cache, holding the state of a mechanism.

    `update` hands the new keys and values through; the mechanism takes `state`, tensors with the batch
    first, and sets the new one. It cannot be cropped, so assisted decoding is refused.

    Attributes:
        owner: name of the mechanism, for messages.
        state: None before the first position.
        length: number of positions in the state, padding counted.
        expected: whether the module's own mechanism is about to take the new positions.
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


@dataclass(frozen=True, eq=False)
class Carrier:
    """Who keeps a state for an attention module.

    Attributes:
        owner: name of the mechanism; whoever has the same name reads the same states.
        absorb: turns keys [B, Hkv, S, D], values [B, Hkv, S, Dv], the number of query heads and valid
            [B, S] or None into a state.
        route: of the module's site.
        serves: whether it serves a module at present; None for always.
    """

    owner: str
    absorb: Absorb
    route: Route = "interface"
    serves: Serves | None = None


_CARRIERS: weakref.WeakKeyDictionary[nn.Module, list[Carrier | None]] = weakref.WeakKeyDictionary()
_HELD: weakref.WeakKeyDictionary[nn.Module, StateLayer] = weakref.WeakKeyDictionary()


def held(module: nn.Module) -> StateLayer | None:
    """Return the layer that the current call of an attention module keeps its state in."""
    return _HELD.get(module)


def carried(module: nn.Module) -> bool:
    """Whether anyone keeps states for an attention module."""
    return module in _CARRIERS


class Carrying:
    """That a module's states are kept by one carrier, or by none; `remove()` ends it."""

    def __init__(self, module: nn.Module, carrier: Carrier | None) -> None:
        self._module = weakref.ref(module)
        self._carrier = carrier
        self._hooks = [
            module.register_forward_pre_hook(_place, with_kwargs=True),
            module.register_forward_hook(_let_go, always_call=True),
        ]
        _CARRIERS.setdefault(module, []).append(carrier)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        module = self._module()
        if module is None or module not in _CARRIERS:
            return
        stack = _CARRIERS[module]
        last = max(i for i, carrier in enumerate(stack) if carrier is self._carrier)
        del stack[last]
        if not stack:
            del _CARRIERS[module]


def carry(module: nn.Module, carrier: Carrier | None) -> Carrying:
    """Let `carrier` keep states in whatever cache an attention module is given, until `remove()`.

    The one that came last serves the module. None stands for a mechanism that reads keys and values.

    Raises:
        UnsupportedModel: where the module does not say which layer of a cache is its own.
    """
    if carrier is not None and not isinstance(getattr(module, "layer_idx", None), int):
        raise UnsupportedModel(
            f"{type(module).__name__} has no layer_idx, so {carrier.owner} finds no place for its state."
        )
    return Carrying(module, carrier)


def _place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module's forward: put the layer of its state into the cache. A copied module has none."""
    stack = _CARRIERS.get(module)
    carrier = stack[-1] if stack else None
    given = (*args, *kwargs.values())
    cache = next((x for x in given if isinstance(x, Cache | EncoderDecoderCache)), None)
    if carrier is None or cache is None or (carrier.serves is not None and not carrier.serves(module)):
        return
    if carrier.route != "interface":
        raise UnsupportedModel(
            f"{type(module).__name__} calls scaled_dot_product_attention itself, so {carrier.owner} cannot "
            "keep a state in its cache; run it with use_cache=False."
        )
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    mask = next((x for x in given if isinstance(x, LazyMask)), None)
    layer = _HELD[module] = _placed(cache, module, carrier, mask)
    layer.expected = True


def _let_go(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After a module's forward: the state is the cache's alone."""
    layer = _HELD.pop(module, None)
    if layer is not None:
        layer.expected = False


def _placed(cache: Cache, module: nn.Module, carrier: Carrier, mask: LazyMask | None) -> StateLayer:
    """The state layer of a module in a cache, put there where another one is."""
    index = int(module.layer_idx)  # type: ignore[arg-type]
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= index:
        raise UnsupportedModel(f"This cache has {len(cache.layers)} layers, and no layer {index}.")
    old = cache.layers[index]
    if isinstance(old, StateLayer):
        if old.owner != carrier.owner:
            raise RegardError(
                f"This cache holds the state of {old.owner}, and {carrier.owner} cannot read it; start "
                "again with a new cache."
            )
        return old
    if type(old) is not DynamicLayer:
        raise UnsupportedModel(
            f"{carrier.owner} carries a state, and can keep it in a dynamic cache of full attention only; "
            f"layer {index} of this cache is a {type(old).__name__}."
        )
    new = StateLayer(carrier.owner)
    length = old.get_seq_length()
    if length:
        assert old.keys is not None and old.values is not None
        padding = None if mask is None else mask.padding
        valid = None if padding is None else padding[:, :length]
        heads = old.keys.shape[1] * int(getattr(module, "num_key_value_groups", 1))
        new.state = carrier.absorb(old.keys, old.values, heads, valid)
        new.length, new.is_initialized = length, True
    cache.layers[index] = new
    return new
