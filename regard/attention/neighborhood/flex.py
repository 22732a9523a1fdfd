"""Neighbourhood attention by FlexAttention, with the same predicate as a block mask."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.engines.grids import Axis
from regard.errors import RegardError


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return attention on a grid, [B, X1.., H, Dv], and its logsumexp.

    Raises:
        RegardError: for what FlexAttention, or this use of it, cannot do.
    """
    if q.device.type != "cuda":
        raise RegardError("impl='flex' is for a GPU: compiled on a CPU it has no logsumexp and no gradients.")
    if q.dtype == torch.float64 or bias is not None:
        raise RegardError("impl='flex' takes no float64 and adds no rpb; use tiles.")
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    out, lse = compiled_flex()(
        *flat, block_mask=block_mask(axes, str(q.device)), scale=scale,
        enable_gqa=q.shape[-2] != k.shape[-2], return_lse=True,
    )  # fmt: skip
    out = out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])
    return out, lse.transpose(1, 2).reshape(q.shape[:-1])


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """Return FlexAttention, compiled for fixed shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=16)
def block_mask(axes: tuple[Axis, ...], device: str) -> Any:
    """Return a neighbourhood as FlexAttention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    tables = [axis.visible().to(device) for axis in axes]
    length = math.prod(axis.length for axis in axes)

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= 0
        for axis, table in zip(reversed(axes), reversed(tables), strict=True):
            seen = seen & table[query % axis.length, key % axis.length]
            query, key = query // axis.length, key // axis.length
        return seen

    return create_block_mask(near, None, None, length, length, device=device)
