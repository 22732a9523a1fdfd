"""The mask function registered with transformers: a mask that is evaluated a block of rows at a time.

transformers asks for one mask per forward and layer type, and hands whatever it gets to every attention
call. A `LazyMask` holds lengths, offsets and the index function; no [T, S] tensor exists until someone
asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

from regard.engines.masks import CausalMask, Mask, visible_range
from regard.runtime.implementation import outside

KEEP_BYTES = 32 * 2**20
PLAIN = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)


class LazyMask(BlockMask):
    """A mask as lengths, offsets and an index function.

    It is a `BlockMask` only so that transformers recognises a prepared mask when `generate()` hands one
    back; none of that class' data exists here.

    Attributes:
        view: the same mask as `regard.engines` takes it.
        q_offset, kv_offset: absolute position of the first query and the first key.
        valid_queries, valid_keys: bool [B, T] and [B, S], or None where nothing is padding. Queries of
            cross-attention are not known here.
        plain: whether it is nothing but causal order, or everything, and padding.
        pad_left: [B], padding in front of each sequence, or None.
        additive: where the model's own attention adds its mask, the dtype in which it does; else None.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        q_offset: int,
        kv_offset: int,
        index_function: Callable[..., Tensor],
        padding: Tensor | None,
        simple: str | None,
        use_vmap: bool,
        device: torch.device,
        plain: bool = False,
        additive: torch.dtype | None = None,
    ) -> None:
        self._shape = shape
        self.additive = additive
        self.plain = plain or simple is not None
        self.q_offset, self.kv_offset = q_offset, kv_offset
        self.index_function, self.use_vmap = index_function, use_vmap
        self.device_ = device
        self.padding = padding
        self.simple = simple
        queries, keys = shape[2], shape[3]
        self.view: Mask
        if simple == "all":
            self.view = Mask(queries, keys)
        elif simple == "causal":
            self.view = CausalMask(queries, keys, 0, device)
        else:
            self.view = _IndexMask(self)
        self._dense: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self.additive or torch.bool

    @property
    def device(self) -> torch.device:
        return self.device_

    def dim(self) -> int:
        return 4

    def contiguous(self) -> LazyMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        return self

    def __repr__(self) -> str:
        return f"LazyMask(shape={self._shape}, q_offset={self.q_offset}, kv_offset={self.kv_offset})"

    __str__ = __repr__

    def to_dense(self) -> Tensor:
        """Return the whole mask, bool [B, 1, T, S]; built once."""
        if self._dense is None:
            batch, _, queries, keys = self._shape
            rows = self.view.rows(0, queries, 0, keys)
            if rows is None:
                rows = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.device_)
            self._dense = rows.expand(batch, -1, queries, keys)
        return self._dense

    def to_tensor(self) -> Tensor:
        """Return the tensor that the model's own attention would have been given: additive, or bool."""
        dense = self.to_dense()
        if self.additive is None:
            return dense
        lowest = torch.finfo(self.additive).min
        return torch.zeros_like(dense, dtype=self.additive).masked_fill_(~dense, lowest)

    def __getitem__(self, index: Any) -> Any:
        return self.to_tensor()[index]

    def __getattr__(self, name: str) -> Any:
        """Be what the model's own attention would have been given, where a model computes with it."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.to_tensor(), name)

    def __invert__(self) -> Tensor:
        return ~self.to_tensor()

    def __eq__(self, other: object) -> Any:
        return self is other if other is None or isinstance(other, LazyMask) else self.to_tensor() == other

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Serve attention outside the interface that computes with the mask."""
        args, kwargs = tree_map_only(LazyMask, LazyMask.to_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def valid_keys(self) -> Tensor | None:
        if self.padding is None:
            return None
        return self.padding[:, self.kv_offset : self.kv_offset + self._shape[3]]

    @property
    def valid_queries(self) -> Tensor | None:
        if self.padding is None:
            return None
        return self.padding[:, self.q_offset : self.q_offset + self._shape[2]]

    @property
    def pad_left(self) -> Tensor | None:
        return None if self.padding is None else self.padding.int().argmax(1)


class _IndexMask(Mask):
    """Rows of a `LazyMask`, evaluated when asked for; small ones are kept for the next layer."""

    def __init__(self, lazy: LazyMask) -> None:
        super().__init__(lazy.shape[2], lazy.shape[3])
        self.lazy = lazy
        self._bounds: dict[tuple[int, int], tuple[int, int]] = {}
        self._kept: dict[tuple[int, int, int, int], Tensor] = {}
        self._kept_bytes = 0

    def bounds(self, start: int, stop: int) -> tuple[int, int]:
        if (start, stop) not in self._bounds:
            rows = self._evaluate(start, stop, 0, self.keys)
            self._bounds[start, stop] = visible_range(rows)
        return self._bounds[start, stop]

    def rows(self, start: int, stop: int, first: int, last: int) -> Tensor:
        key = (start, stop, first, last)
        if key not in self._kept:
            rows = self._evaluate(*key)
            self._kept_bytes += rows.numel()
            if self._kept_bytes > KEEP_BYTES and len(self._kept):
                return rows
            self._kept[key] = rows
        return self._kept[key]

    def for_sdpa(self) -> tuple[Tensor | None, bool]:
        return self.lazy.to_dense(), False

    def _evaluate(self, start: int, stop: int, first: int, last: int) -> Tensor:
        lazy = self.lazy
        batch = torch.arange(lazy.shape[0], device=lazy.device_)
        head = torch.zeros(1, dtype=torch.long, device=lazy.device_)
        rows = torch.arange(start, stop, device=lazy.device_) + lazy.q_offset
        columns = torch.arange(first, last, device=lazy.device_) + lazy.kv_offset
        if lazy.use_vmap:
            with masking_utils.TransformGetItemToIndex():
                expanded = masking_utils._vmap_expansion_sdpa(lazy.index_function)
                return expanded(batch, head, rows, columns)
        mask = lazy.index_function(
            batch[:, None, None, None], head[None, :, None, None],
            rows[None, None, :, None], columns[None, None, None, :],
        )  # fmt: skip
        return mask.expand(mask.shape[0], 1, len(rows), len(columns))


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> LazyMask | None:
    """Build the mask of one forward and layer type; the signature is that of transformers' mask functions.

    Returns:
        None where every query of an encoder sees every key, as every other mask function does.
    """
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    if local_size is None:
        plain = mask_function in PLAIN
    else:
        plain = allow_is_causal_skip and q_offset + q_length <= local_size
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    simple = None
    if allow_is_causal_skip and masking_utils._ignore_causal_mask_sdpa(
        padding, q_length, kv_length, q_offset, kv_offset, local_size
    ):
        simple = "all" if q_length == 1 else "causal"
    elif allow_is_bidirectional_skip and masking_utils._ignore_bidirectional_mask_sdpa(
        padding, kv_length, local_size
    ):
        return None
    if padding is not None and not bool(padding.all()):
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    else:
        padding = None
    return LazyMask(
        (batch_size, 1, q_length, kv_length), q_offset, kv_offset, mask_function, padding, simple,
        use_vmap, torch.device(device), plain, None if outside(config) == "sdpa" else dtype,
    )  # fmt: skip


def dense_mask(*, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Build the mask that the model's own attention would have been given, for models that look into it."""
    build = masking_utils.sdpa_mask if outside(config) == "sdpa" else masking_utils.eager_mask
    mask: Tensor | None = build(config=config, **kwargs)
    return mask
