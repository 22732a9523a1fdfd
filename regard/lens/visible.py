"""Which keys the rows of a call can see, counted once a forward and shared by all layers and lenses.

A forward's layers mostly share one mask. What depends on the mask and the tokens alone is computed at the
first layer that meets it, and kept in the run until the next forward.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.engines.masks import CausalMask, Mask, TensorMask, unhidden
from regard.engines.rows import RowBlock
from regard.runtime.call import Call
from regard.runtime.run import Run

_SHARED = object()
_NUMBERS = itertools.count()
_SERIAL: weakref.WeakKeyDictionary[Mask, int] = weakref.WeakKeyDictionary()


def per_forward(run: Run) -> dict[Any, Any]:
    """Return the dict that all lenses share in the present forward of `run`; empty at its start."""
    state = run.state(_SHARED)
    if state.get("fed") != run.fed:
        state.clear()
        state["fed"] = run.fed
        state["store"] = {}
    return state["store"]


def once(call: Call, name: Any, compute: Callable[[], Any]) -> Any:
    """Return what `compute` gives, computed once a forward for all calls of the same mask and place.

    The mask is kept with it, so that the address in the key stays taken.
    """
    store, key = per_forward(call.run), (name, mask_key(call))
    if key not in store:
        store[key] = compute(), call.mask
    return store[key][0]


def mask_key(call: Call) -> tuple[Any, ...]:
    """Return what tells a call's mask and place from those of the other calls of a forward."""
    mask = call.mask
    if type(mask) is CausalMask:
        rule: Any = ("causal", mask.shift)
    elif type(mask) is Mask:
        rule = "all"
    elif isinstance(mask, TensorMask):
        rule = (mask.tensor.data_ptr(), tuple(mask.tensor.shape), tuple(mask.tensor.stride()))
    else:
        rule = _SERIAL.setdefault(mask, next(_NUMBERS))
    return (rule, call.site.kind, call.query_length, call.key_length, call.q_offset, call.kv_offset)


def kept_rows(block: RowBlock, length: int | None = None) -> Tensor | None:
    """Return which rows of a block count: real ones, of a position under `length`; None for all.

    Returns:
        bool [B|1, R], or None.
    """
    keep = block.valid_rows
    if length is None or block.call.q_offset + block.stop <= length:
        return keep
    early = block.query_positions < length
    return early if keep is None else keep & early


def visible_part(call: Call, start: int, stop: int, first: int, last: int) -> Tensor | None:
    """Return which of the keys `first:last` the rows `start:stop` can see, bool [B|1, R, K]; None for all.

    A key that only some heads can see counts as visible.
    """
    mask = call.mask.rows(start, stop, first, last)
    if mask is None:
        return None
    mask = unhidden(mask)
    mask = mask[:, 0] if mask.shape[1] == 1 else mask.any(1)
    return mask.expand(-1, stop - start, -1)


@dataclass
class Visible:
    """Counts of what can be seen.

    Attributes:
        keys: how many keys each row sees, float32 [B|1, T].
        rows: how many of the kept rows see each key, float32 [B|1, S].
        done: the rows before this one are counted.
        anchor: a mask's tensor, kept so that its address stays taken.
    """

    keys: Tensor
    rows: Tensor
    done: int
    anchor: Tensor | None


def visible(block: RowBlock, length: int | None = None) -> Visible:
    """Return the counts of a block's call, complete up to the last row of this block.

    Blocks must come in ascending order from row 0, as they do to a lens that wants all rows.

    Args:
        length: rows of this position and later are not counted in `rows`.
    """
    call = block.call
    store = per_forward(block.run)
    key = ("visible", length, mask_key(call))
    found: Visible | None = store.get(key)
    if found is None:
        device = call.q.device
        found = Visible(
            torch.zeros(1, call.query_length, device=device),
            torch.zeros(1, call.key_length, device=device),
            0,
            call.mask.tensor if isinstance(call.mask, TensorMask) else None,
        )
        store[key] = found
    if block.stop > found.done:
        _count(found, block, max(found.done, block.start), length)
    return found


def _count(found: Visible, block: RowBlock, start: int, length: int | None) -> None:
    stop, first, last = block.stop, block.key_start, block.key_stop
    part = visible_part(block.call, start, stop, first, last)
    keep = kept_rows(block, length)
    keep = None if keep is None else keep[:, start - block.start :]
    batch = max(1 if x is None else x.shape[0] for x in (part, keep))
    if batch > found.keys.shape[0]:
        found.keys = found.keys.expand(batch, -1).clone()
        found.rows = found.rows.expand(batch, -1).clone()
    if part is None:
        found.keys[:, start:stop] = last - first
        rows = torch.tensor(float(stop - start)) if keep is None else keep.float().sum(1, keepdim=True)
        found.rows[:, first:last] += rows.to(found.rows.device)
    else:
        found.keys[:, start:stop] = part.sum(-1, dtype=torch.float32)
        part = part if keep is None else part & keep[..., None]
        found.rows[:, first:last] += part.sum(1, dtype=torch.float32)
    found.done = stop
