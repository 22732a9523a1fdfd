"""Directions of a given length in the space of attention scores, a sequence at a time.

Scores are of one or more places, each [B, ...] with a mask of those that count; a sequence's direction runs
over all of them together. The softmax does not feel a shift of a whole row, so a random direction that is to
be held against a gradient, which has none, has it taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch

TINY = 1e-12
Scores = tuple[Tensor, ...]
LogitsOf = Callable[[Scores], Tensor]
"""Logits [B, classes] with tensors added to the attention scores, one a place."""


def unit(values: Sequence[Tensor], valid: Sequence[Tensor]) -> Scores:
    """Return values scaled to norm 1 for each sequence, over those that are valid.

    A sequence whose values are all zero, or not all finite, gets zeros.

    Args:
        values: float32 [B, ...] each.
        valid: bool, of the same shapes.
    """
    kept = tuple(v.float() * m for v, m in zip(values, valid, strict=True))
    size = sum(v.flatten(1).square().sum(1) for v in kept)
    some = (size > TINY**2) & torch.isfinite(size)  # type: ignore[operator, arg-type]
    scale = torch.where(some, size, 1.0).rsqrt()
    return tuple(torch.where(_like(some, v), v * _like(scale, v), 0.0) for v in kept)


def _like(each: Tensor, values: Tensor) -> Tensor:
    return each.view(-1, *[1] * (values.ndim - 1))


def still(r: Sequence[Tensor]) -> int:
    """Return how many sequences a perturbation leaves as they are."""
    moved = torch.stack([x.flatten(1).abs().amax(1) for x in r]).amax(0)
    return int((moved == 0).sum())


def signs(values: Sequence[Tensor], valid: Sequence[Tensor]) -> Scores:
    """Return the sign of every valid value."""
    return tuple(v.float().sign() * m for v, m in zip(values, valid, strict=True))


def random_unit(valid: Sequence[Tensor], generator: torch.Generator | None = None) -> Scores:
    """Return a random direction of norm 1 for each sequence, without the shift of whole rows."""
    drawn = tuple(torch.randn(m.shape, generator=generator, device=m.device) * m for m in valid)
    return unit(tuple(level(v, m) for v, m in zip(drawn, valid, strict=True)), valid)


def level(values: Tensor, valid: Tensor) -> Tensor:
    """Return values with the mean of each row's valid ones taken out, the last dimension a row."""
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    return (values - (values * valid).sum(-1, keepdim=True) / count) * valid


def scaled(values: Sequence[Tensor], size: float) -> Scores:
    """Return every value times a number."""
    return tuple(v * size for v in values)


def check_masks(valid: Sequence[Tensor]) -> Scores:
    """Return the masks as bool.

    Raises:
        RegardError: where there is none.
        ShapeMismatch: where batches differ, or a mask has no row.
    """
    masks = tuple(m.bool() for m in valid)
    if not masks:
        raise RegardError("there are no attention scores to perturb.")
    if any(m.ndim < 2 or m.shape[0] != masks[0].shape[0] for m in masks):
        shapes = ", ".join(str(list(m.shape)) for m in masks)
        raise ShapeMismatch(f"masks of scores are {shapes}; each must be [B, ..., keys] with the same B.")
    return masks


def check_options(eps: float, lam: float, variant: str, variants: Sequence[str]) -> None:
    """Refuse a length or weight that is negative or not finite, and an unknown variant.

    Raises:
        RegardError: saying which.
    """
    for name, value in (("eps", eps), ("lam", lam)):
        if not 0 <= value < float("inf"):
            raise RegardError(f"{name} is {value}; it must be a finite number from 0.")
    if variant not in variants:
        raise RegardError(f"variant is {variant!r}; it must be one of {', '.join(variants)}.")
