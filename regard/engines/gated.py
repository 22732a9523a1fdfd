"""First-order linear recurrences, one a channel.

    h_i = a_i * h_{i-1} + b_i

By doubling (Hillis and Steele, 1986): after round r every position holds the sum over the 2^r positions up to
it, so log2(T) rounds of products of whole tensors do it. Operations O(T log T) a channel, memory the same
under autograd and O(T) without. Nothing is divided and no logarithm taken, so a may be 0 or negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ShapeMismatch


def gated_scan(a: Tensor, b: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return h at every position, and the last one.

    Args:
        a: [B, T, D], what is kept of the state before.
        b: [B, T, D], what is added.
        state: h before the first position, [B, D], or None for zero.

    Returns:
        h [B, T, D] and the state after position T, [B, D]; both float64 where `b` is and float32 otherwise.

    Raises:
        ShapeMismatch: where they do not fit together.

    Example:
        >>> ones = torch.ones(1, 4, 1)
        >>> gated_scan(0.5 * ones, ones)[0].flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    if a.ndim != 3 or a.shape != b.shape:
        raise ShapeMismatch(f"a and b must both be [B, T, D], and are {list(a.shape)} and {list(b.shape)}.")
    if state is not None and state.shape != (b.shape[0], b.shape[2]):
        raise ShapeMismatch(f"the state must be {[b.shape[0], b.shape[2]]}, and is {list(state.shape)}.")
    kind = torch.float64 if b.dtype == torch.float64 else torch.float32
    kept, h = a.to(kind), b.to(kind)
    before = h.new_zeros(h.shape[0], h.shape[2]) if state is None else state.to(kind)
    if h.shape[1] == 0:
        return h, before
    h = torch.cat([(h[:, 0] + kept[:, 0] * before)[:, None], h[:, 1:]], 1)
    reach = 1
    while reach < h.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + kept[:, reach:] * h[:, :-reach]], 1)
        kept = torch.cat([kept[:, :reach], kept[:, reach:] * kept[:, :-reach]], 1)
        reach *= 2
    return h, h[:, -1]
