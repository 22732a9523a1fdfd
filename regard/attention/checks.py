"""What functions that a user calls with tensors of their own refuse before they compute."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch


def refuse_nan(**given: Tensor | None) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        RegardError: naming the first, and how many of its numbers are not finite.
    """
    for name, x in given.items():
        if x is not None and not bool(x.isfinite().all()):
            count = int((~x.isfinite()).sum())
            raise RegardError(f"{name} holds {count} numbers that are NaN or infinite, of {x.numel()}.")


def check_call(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values that do not fit together, or hold NaN or infinity.

    Numbers are looked at on a CPU alone, where that costs no waiting.

    Raises:
        ShapeMismatch: where shapes do not fit.
        RegardError: where a number is not finite.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ShapeMismatch(
                f"{name} must be floating-point [batch, heads, time, dim], and is {list(x.shape)}."
            )
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % max(1, k.shape[1]) == 0
    if not fits or k.shape[:3] != v.shape[:3]:
        raise ShapeMismatch(
            "q must be [B, H, T, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv], with H a multiple of Hkv; they "
            f"are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}."
        )
    if q.device.type == "cpu":
        refuse_nan(q=q, k=k, v=v)


def check_padding(name: str, valid: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse a padding mask that is not bool of a shape."""
    if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != shape):
        raise ShapeMismatch(
            f"{name} must be bool {list(shape)}, False at padding, and is "
            f"{str(valid.dtype).removeprefix('torch.')} {list(valid.shape)}."
        )


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RegardError(f"{name} is {value!r}; it must be a number above 0.")


def check_statistics(x: Tensor) -> None:
    """Refuse a map [B, C, X1..] of one number a channel, of which batch normalisation has no variance."""
    if x[:, 0].numel() == 1:
        raise RegardError(
            f"x is {list(x.shape)}, one number a channel, of which batch normalisation in training has no "
            "variance; give a larger batch or map, or call eval()."
        )


def check_state(state: tuple[Tensor, ...], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Refuse a state that is not of these shapes, all in one dtype."""
    if [tuple(x.shape) for x in state] != shapes:
        told = ", ".join(str(list(x.shape)) for x in state)
        wanted = ", ".join(str(list(shape)) for shape in shapes)
        raise ShapeMismatch(f"the state has shapes {told}; for these positions it must have {wanted}.")
    wrong = [x.dtype for x in state if x.dtype != dtype]
    if wrong:
        raise ShapeMismatch(f"the state is {wrong[0]}; for these positions it must be {dtype}.")
