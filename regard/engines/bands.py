"""Attention whose mask is narrow: each block of rows against the few keys that it can see.

operations and memory O(T * (R + W)) for blocks of R rows that see W keys, instead of O(T * S)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.engines.masks import Mask, TensorMask
from regard.engines.rows import AttentionInputs, attend


def attend_by_blocks(x: AttentionInputs, block_rows: int) -> Tensor:
    """Return softmax attention [B, H, T, Dv], with the keys outside of `x.mask.bounds` left out.

    Args:
        x: the call.
        block_rows: query rows in a block; best about as many as keys that a row sees.
    """
    length = x.q.shape[2]
    if length <= block_rows:
        return attend(_part(x, 0, length))
    parts = [attend(_part(x, s, min(s + block_rows, length))) for s in range(0, length, block_rows)]
    return torch.cat(parts, 2)


def _part(x: AttentionInputs, start: int, stop: int) -> AttentionInputs:
    """The rows `start:stop` of a call, and the keys that any of them sees."""
    first, last = x.mask.bounds(start, stop)
    rows = x.mask.rows(start, stop, first, last)
    size = (stop - start, last - first)
    mask = Mask(*size) if rows is None else TensorMask(rows, *size)
    bias = x.bias
    if bias is not None:
        bias = (bias[..., start:stop, :] if bias.shape[-2] > 1 else bias)[..., first:last]
    return replace(
        x, q=x.q[:, :, start:stop], k=x.k[:, :, first:last], v=x.v[:, :, first:last], mask=mask, bias=bias
    )  # fmt: skip
