"""What each key receives, kept over the blocks, calls and decoding steps of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.engines.stats import column_sum
from regard.lens.base import first_real, room
from regard.lens.visible import kept_rows, visible
from regard.runtime.call import Call
from regard.runtime.protocol import EVERYTHING, Wanted

TINY = 1e-8


def first_rows(call: Call, length: int | None) -> Wanted | None:
    """Return what to want of a call to see the rows of positions under `length`; None past them."""
    if length is None:
        return EVERYTHING
    most = 0 if call.pad_left is None else int(call.pad_left.max())
    stop = min(call.query_length, length + most - call.q_offset)
    return Wanted(rows=(0, stop)) if stop > 0 else None


def call_columns(block: RowBlock, length: int | None = None, proxy: bool = False) -> Tensor:
    """Return the column sums of a call up to and with this block, [B, H, S]; the same memory throughout.

    All lenses that ask share one sum.

    Args:
        length: rows of this position and later are left out.
        proxy: divide each row of |weights| by its sum first.
    """
    call = block.call
    key = ("columns", id(call), length, proxy)
    found = call.extra.get(key)
    if found is None:
        shape = (*block.weights.shape[:2], call.key_length)
        found = call.extra[key] = [block.weights.new_zeros(shape), 0]
    if block.stop > found[1]:
        keep = kept_rows(block, length)
        plain = keep is block.valid_rows and not proxy
        mass = block.column_sum if plain else _columns(block, keep, proxy)
        found[0][..., block.key_start : block.key_stop] += mass
        found[1] = block.stop
    return found[0]


def note_columns(state: dict[str, Any], block: RowBlock, length: int | None, proxy: bool = False) -> None:
    """Take note of a block, for `add_columns` at the end of the call."""
    state["call"] = (call_columns(block, length, proxy), visible(block, length))


def _columns(block: RowBlock, keep: Tensor | None, proxy: bool) -> Tensor:
    weights = block.weights
    if not proxy:
        assert keep is not None
        return column_sum(weights, keep.expand(weights.shape[0], -1))
    size = weights.abs()
    share = 1 / (size.sum(-1, keepdim=True) + TINY)
    if keep is not None:
        share = share * keep[:, None, :, None]
    return torch.matmul(share.transpose(2, 3), size)[:, :, 0]


def add_columns(state: dict[str, Any], call: Call) -> None:
    """Add a call to `state["mass"]`, [B, H, P], what each key received, and `state["rows"]`, [B, P].

    The latter says how many rows could see the key. P counts positions with padding; `state["pad"]`,
    [B], is the padding in front.
    """
    if "call" not in state:
        return
    mass, seen = state.pop("call")
    if "pad" not in state:
        state["pad"] = first_real(call)
    first, last = call.kv_offset, call.kv_offset + call.key_length
    room(state, "mass", (*mass.shape[:2], last), mass)[..., first:last] += mass
    rows = seen.rows.expand(len(mass), -1)
    room(state, "rows", (len(mass), last), rows)[..., first:last] += rows


def aligned(x: Tensor, pad: Tensor) -> Tensor:
    """Shift each sequence of `x` [B, ..., P] so that index 0 is its first real token; zeros at the end."""
    if not bool(pad.any()):
        return x
    index = torch.arange(x.shape[-1]) + pad[:, None]
    beyond = index >= x.shape[-1]
    shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    index = index.clamp_max(x.shape[-1] - 1).view(shape).expand_as(x)
    return x.gather(-1, index).masked_fill(beyond.view(shape), 0)
