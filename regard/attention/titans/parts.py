"""Parts of Titans' layers: padding moved to the end, a short convolution, checks of input and options."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch


class Aligned:
    """x with its valid positions first, and the way back.

    Attributes:
        x: [B, T, dim].
        filled: int64 [B], how many positions of each are valid; None for all.
    """

    def __init__(self, x: Tensor, valid: Tensor | None) -> None:
        self.x, self.filled, self._back = x, None, None
        if valid is None:
            return
        if valid.dtype != torch.bool or valid.shape != x.shape[:2]:
            raise ShapeMismatch(
                f"valid must be bool {list(x.shape[:2])}, False at padding, and is "
                f"{str(valid.dtype).removeprefix('torch.')} {list(valid.shape)}."
            )
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
        self.filled, self._back = valid.sum(1), order.argsort(1)
        clean = torch.where(valid[..., None], x, 0)
        self.x = clean.gather(1, order[..., None].expand_as(x))

    def back(self, out: Tensor) -> Tensor:
        """Return what was computed of `x` in the order of positions that was given."""
        return out if self._back is None else out.gather(1, self._back[..., None].expand_as(out))


def newest(kept: Tensor, new: Tensor, filled: Tensor | None, dim: int) -> Tensor:
    """Return the last valid positions of [kept, new], as many as `kept` has, along `dim` (1 or 2)."""
    both = torch.cat([kept, new], dim)
    count, length = kept.shape[dim], new.shape[dim]
    if filled is None:
        return both.narrow(dim, length, count)
    places = filled[:, None] + torch.arange(count, device=new.device)
    places = places[..., None] if dim == 1 else places[:, None, :, None]
    return both.gather(dim, places.expand_as(kept))


class ShortConvolution(nn.Module):
    """A causal convolution of a few positions, one filter a channel.

    Args:
        channels: of x.
        width: positions that a filter sees, its own the last.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.kept = width - 1
        self.filters = nn.Parameter(width**-0.5 * (2 * torch.rand(width, channels) - 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def fresh(self, x: Tensor) -> Tensor:
        """Return what stands before the first position: zeros, [B, width - 1, channels]."""
        return x.new_zeros(x.shape[0], self.kept, x.shape[-1])

    def forward(self, x: Tensor, before: Tensor, filled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the convolved x [B, T, channels], and what stands before the next position."""
        after = newest(before, x, filled, 1)
        both, length = torch.cat([before.to(x.dtype), x], 1), x.shape[1]
        out = self.bias
        for place, row in enumerate(self.filters):
            out = out + row * both[:, place : place + length]
        return out, after


class Joined(nn.Module):
    """One side gated by the other, each normalised with weights of its own: W (norm(a) * s(norm(b)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.left, self.right = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        joined: Tensor = self.output(self.left(a) * self.right(b).sigmoid())
        return joined


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, T, H D] as [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H D]."""
    return x.transpose(1, 2).flatten(2)


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention under a bool mask, [B, H, T, D]; 0 of no rows."""
    return F.scaled_dot_product_attention(q, k, v, visible) if q.shape[2] else q


def check_x(x: Tensor, dim: int) -> None:
    """Refuse input of another shape, or with numbers that are not finite."""
    if x.ndim != 3 or x.shape[-1] != dim or not x.is_floating_point():
        raise ShapeMismatch(f"x must be floating-point [batch, time, {dim}], and is {list(x.shape)}.")
    if not bool(torch.isfinite(x).all()):
        raise RegardError("x holds a number that is not finite.")


def check_state(state: Any, wanted: list[list[int]], floating: torch.dtype | None = None) -> None:
    """Refuse a state that is not a tuple of tensors of these shapes; -1 is any size."""
    if not isinstance(state, tuple) or not all(isinstance(t, Tensor) for t in state):
        raise RegardError(f"state must be what step() returned, and is {type(state).__name__}.")
    found = [list(t.shape) for t in state]
    fits = len(found) == len(wanted) and all(
        len(f) == len(w) and all(b in (-1, a) for a, b in zip(f, w, strict=True))
        for f, w in zip(found, wanted, strict=True)
    )
    if not fits:
        raise ShapeMismatch(
            f"the state has tensors {found}, and this layer, at this batch, {wanted}; a state goes on with "
            "the layer and the sequences that it came from."
        )
    kinds = {t.dtype for t in state if t.is_floating_point()}
    if floating is not None and kinds - {floating}:
        raise ShapeMismatch(f"the state holds {', '.join(map(str, kinds))}, and this layer {floating}.")


def check_counts(given: dict[str, Any], optional: tuple[str, ...] = (), least: int = 1) -> None:
    """Refuse options that are no whole numbers from `least`; those of `optional` may be None."""
    for name, value in given.items():
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
