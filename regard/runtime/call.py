"""One attention call, as lenses and edits see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.engines.masks import CausalMask, Mask, PaddedMask, TensorMask
from regard.engines.rows import AttentionInputs, RowBlock
from regard.errors import UnsupportedModel
from regard.runtime.carried import StateLayer, held
from regard.runtime.implementation import outside
from regard.runtime.mask import LazyMask
from regard.runtime.run import Run
from regard.runtime.site import Site

if TYPE_CHECKING:
    from regard.runtime.protocol import Edit

REFUSED_KWARGS = ("indices", "block_indices")
CACHED = ("text", "decoder")


@dataclass(eq=False)
class Call(AttentionInputs):
    """One attention call of one site.

    Attributes:
        run, site: what it is part of.
        causal: whether a row may not see later keys.
        head_outputs: [B, H, T, Dv], set after the mixing of values, before the output projection.
        index: 0 for the first call of this site in this forward, and so on.
        part: tells the sequences of a site apart where a run has several: images that are one call each.
            Calls of the same part are of the same sequences, as in decoding.
        main: the kind of site that a bare layer number means.
        q_offset, kv_offset: absolute positions of the first query and the first key, padding counted.
        plain: whether the mask is nothing but causal order, or everything, and padding.
        served: the edits that wanted this call.
        carried: where the layer keeps a state instead of keys and values, its cache layer; `k` and `v` are
            then of the new positions only.
    """

    run: Run = field(default_factory=Run)
    site: Site = None  # type: ignore[assignment]
    causal: bool = False
    head_outputs: Tensor | None = None
    index: int = 0
    part: int = 0
    main: str = "text"
    q_offset: int = 0
    kv_offset: int = 0
    valid_queries: Tensor | None = None
    valid_keys: Tensor | None = None
    pad_left: Tensor | None = None
    plain: bool = True
    carried: StateLayer | None = None
    served: Sequence[Edit] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def query_length(self) -> int:
        return self.q.shape[2]

    @property
    def key_length(self) -> int:
        return self.k.shape[2]

    @cached_property
    def query_positions(self) -> Tensor:
        """Absolute positions of the queries, int64 [B|1, T]; the first real token is 0."""
        return self._positions(self.q_offset, self.query_length)

    @cached_property
    def key_positions(self) -> Tensor:
        """Absolute positions of the keys, int64 [B|1, S]; the first real token is 0."""
        return self._positions(self.kv_offset, self.key_length)

    def _positions(self, offset: int, length: int) -> Tensor:
        positions = torch.arange(offset, offset + length, device=self.q.device)[None]
        return positions if self.pad_left is None else positions - self.pad_left[:, None]

    def annotate(self, block: RowBlock) -> RowBlock:
        """Tell a block which call it is part of, and its positions."""
        block.call, block.run, block.site = self, self.run, self.site
        block.query_positions = self.query_positions[:, block.start : block.stop]
        block.key_positions = self.key_positions[:, block.key_start : block.key_stop]
        if self.valid_queries is not None:
            block.valid_rows = self.valid_queries[:, block.start : block.stop]
        if self.valid_keys is not None:
            block.valid_keys = self.valid_keys[:, block.key_start : block.key_stop]
        return block


def call_from_interface(
    run: Run,
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any,
    options: dict[str, Any],
) -> Call:
    """Build a call from the arguments of transformers' attention interface.

    Raises:
        UnsupportedModel: for paged caches and sparse indexers, which this cannot honour.
    """
    if options.get("cache") is not None:
        raise UnsupportedModel(
            f"{type(site.module).__name__} runs with a paged cache (continuous batching), which regard "
            "cannot follow; call generate() instead of generate_batch()."
        )
    for name in REFUSED_KWARGS:
        if options.get(name) is not None:
            raise UnsupportedModel(
                f"{type(site.module).__name__} selects keys by {name}, which regard does not support."
            )
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(site.module, "is_causal", True)
    if attention_mask is None and outside(getattr(site.module, "config", None)) == "eager":
        is_causal = False
    if attention_mask is None and is_causal and q.shape[2] > 1 and k.shape[2] > q.shape[2]:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    sinks = options.get("s_aux")
    if sinks is None:
        sinks = options.get("sinks")
    if sinks is not None and not (sinks.ndim == 1 or (sinks.ndim == 4 and sinks.shape[3] == 1)):
        raise UnsupportedModel(
            f"{type(site.module).__name__} passes sink logits of shape {tuple(sinks.shape)}; regard takes "
            "[H] and [B, H, T, 1]."
        )
    scaling = options.get("scaling")
    call = Call(
        q=q, k=k, v=v, mask=Mask(q.shape[2], k.shape[2]),
        scale=float(scaling) if scaling is not None else q.shape[-1] ** -0.5,
        softcap=options.get("softcap"), bias=options.get("position_bias"), sink_logits=sinks,
        dropout=float(options.get("dropout") or 0.0), run=run, site=site, extra=options,
        carried=held(site.module),
    )  # fmt: skip
    if call.carried is not None:
        _set_mask_of_new(call, attention_mask)
    else:
        _set_mask(call, attention_mask, bool(is_causal))
    return call


def call_from_sdpa(
    run: Run, site: Site, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
) -> Call:  # fmt: skip
    """Build a call from the arguments of `scaled_dot_product_attention`, on [B, H, T, D] tensors."""
    call = Call(
        q=q, k=k, v=v, mask=Mask(q.shape[2], k.shape[2]),
        scale=scale if scale is not None else q.shape[-1] ** -0.5, dropout=dropout_p, run=run, site=site,
    )  # fmt: skip
    _set_mask(call, attn_mask, is_causal)
    _place(call)
    call.causal = call.causal or (not site.cross and call.q_offset > 0)
    return call


def _set_mask(call: Call, attention_mask: Any, is_causal: bool) -> None:
    queries, keys = call.query_length, call.key_length
    call.causal = is_causal and not call.site.cross
    if isinstance(attention_mask, LazyMask):
        _take_lazy(call, attention_mask)
    elif isinstance(attention_mask, Tensor):
        call.mask, call.plain = TensorMask(attention_mask, queries, keys), False
        call.pad_left, call.valid_queries, call.valid_keys = _padding_of(call)
        _place(call)
    elif attention_mask is not None:
        raise UnsupportedModel(
            f"{type(call.site.module).__name__} passes a mask of type {type(attention_mask).__name__}; "
            "regard takes a tensor or the mask of its own mask function."
        )
    elif is_causal and queries > 1:
        call.mask = CausalMask(queries, keys, 0, call.q.device)
    elif is_causal:
        _place(call)


def _place(call: Call) -> None:
    """Set the offsets of a call whose mask does not tell them: by its cache, or else by its shape.

    A cache of fixed size holds more keys than there are tokens yet, one that slides has lost the first.
    """
    if call.site.cross:
        return
    queries, keys, seen = call.query_length, call.key_length, call.run.seen
    if seen is None or call.site.kind not in CACHED:
        call.q_offset = max(0, keys - queries)
    else:
        call.q_offset, call.kv_offset = seen, max(0, seen + queries - keys)


def _set_mask_of_new(call: Call, attention_mask: Any) -> None:
    """The mask among new positions, where earlier ones are in a state."""
    assert call.carried is not None
    length = call.query_length
    call.causal = True
    call.q_offset = call.kv_offset = call.carried.length - length
    call.mask = CausalMask(length, length, 0, call.q.device)
    if isinstance(attention_mask, LazyMask):
        call.plain = attention_mask.plain
        call.valid_queries = call.valid_keys = attention_mask.valid_queries
        call.pad_left = attention_mask.pad_left
        if call.valid_keys is not None:
            call.mask = PaddedMask(call.mask, call.valid_keys)
    elif attention_mask is not None:
        call.plain = False


def _take_lazy(call: Call, lazy: LazyMask) -> None:
    call.q_offset, call.kv_offset = lazy.q_offset, lazy.kv_offset
    call.plain = lazy.plain
    call.valid_keys = lazy.valid_keys
    if call.site.cross:
        call.valid_queries = call.run.valid_rows(call.query_length)
    else:
        call.valid_queries = lazy.valid_queries
    call.pad_left = lazy.pad_left if not call.site.cross else None
    keys = call.key_length
    if keys == lazy.shape[3] and call.query_length == lazy.shape[2]:
        call.mask = lazy.view
        return
    if keys > lazy.shape[3]:
        raise UnsupportedModel(
            f"{type(call.site.module).__name__} adds keys that its mask does not know ({keys} keys, a mask "
            f"of {lazy.shape[3]}), which regard does not support."
        )
    if lazy.simple == "causal":
        call.mask = CausalMask(call.query_length, keys, 0, call.q.device)
    elif lazy.simple == "all":
        call.mask = Mask(call.query_length, keys)
    else:
        call.mask = TensorMask(lazy.to_dense(), call.query_length, keys)
    if call.valid_keys is not None:
        call.valid_keys = call.valid_keys[:, :keys]


def _padding_of(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Padding, from what the run was given, where the mask came as a bare tensor."""
    valid = call.run.valid
    if valid is None or call.site.cross or valid.shape[1] != call.key_length:
        return None, None, None
    queries = valid[:, valid.shape[1] - call.query_length :]
    return valid.int().argmax(1), queries, valid
