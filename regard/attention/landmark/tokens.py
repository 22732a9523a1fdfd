"""Landmark tokens put into token ids and taken out again, with labels and padding.

    a b c | d e f | g          every = 3
    a b c M d e f M g          M the landmark: after every 3 tokens, also the last

A token that stands before a landmark must predict the token after it, and what a landmark predicts does not
count; or, with `predict`, the landmark is a token to predict like any other, as in the code for Llama. Labels
stand beside their token, as transformers takes them, which shifts them itself.

Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.1, and its code. Status: agrees with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch

IGNORE = -100


class LandmarkText(NamedTuple):
    """Token ids with landmarks, each [B, T].

    Attributes:
        ids: int64.
        mask: bool, False at padding.
        labels: int64, `IGNORE` where nothing is predicted; None where none were asked for.
        is_landmark: bool.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None
    is_landmark: Tensor


def insert_landmarks(
    ids: Tensor,
    every: int,
    id: int,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    predict: bool = False,
    pad: int = 0,
) -> LandmarkText:
    """Return token ids with a landmark after every `every` tokens of each row, padding not counted.

    Args:
        ids: int64 [B, T].
        every: tokens in a block, without its landmark.
        id: of the landmark; no token of `ids` may have it.
        labels: int64 [B, T], what is to be predicted, -100 for nothing; in most cases `ids` itself.
        mask: [B, T], 0 or False at padding, at one end of each row.
        predict: whether landmarks are predicted too.
        pad: id at padding that is added, where rows get different numbers of landmarks.

    Raises:
        ShapeMismatch: where the shapes do not fit.
        RegardError: where there are landmarks already, or an option will not do.

    Example:
        >>> ids = torch.tensor([[1, 2, 3, 4, 5]])
        >>> text = insert_landmarks(ids, 2, 9, labels=ids)
        >>> text.ids.tolist(), text.labels.tolist()
        ([[1, 2, 9, 3, 4, 9, 5]], [[1, 2, 3, -100, 4, 5, -100]])
    """
    valid = _checked(ids, every, id, labels, mask)
    left = bool((~valid[:, :1]).any())
    rows = []
    for row in range(ids.shape[0]):
        kept = None if labels is None else labels[row][valid[row]]
        rows.append(_row(ids[row][valid[row]], kept, every, id, predict))
    longest = max((len(row[0]) for row in rows), default=0)

    def filled(parts: list[Tensor], value: int) -> Tensor:
        if not parts:
            return ids.clone()
        ends = [(longest - len(x), 0) if left else (0, longest - len(x)) for x in parts]
        pairs = zip(parts, ends, strict=True)
        return torch.stack([torch.nn.functional.pad(x, end, value=value) for x, end in pairs])

    new = filled([row[0] for row in rows], pad)
    real = filled([torch.ones_like(row[0]) for row in rows], 0).bool()
    told = None if labels is None else filled([row[1] for row in rows], IGNORE)
    return LandmarkText(new, real, told, (new == id) & real)


def remove_landmarks(x: Tensor, is_landmark: Tensor) -> Tensor:
    """Return what stands at tokens that are no landmarks, such as the logits of a model.

    Args:
        x: [B, T] or [B, T, N].
        is_landmark: bool [B, T], with as many landmarks in each row.

    Raises:
        ShapeMismatch: where the shapes do not fit, or rows have different numbers of landmarks.

    Example:
        >>> marks = torch.tensor([[False, False, True, False]])
        >>> remove_landmarks(torch.tensor([[1, 2, 9, 3]]), marks).tolist()
        [[1, 2, 3]]
    """
    if is_landmark.dtype != torch.bool or x.shape[:2] != is_landmark.shape:
        raise ShapeMismatch(
            f"is_landmark must be bool {list(x.shape[:2])}, as x, and is {list(is_landmark.shape)}."
        )
    counts = is_landmark.sum(-1)
    if len(counts) and bool((counts != counts[0]).any()):
        raise ShapeMismatch(
            f"rows have {int(counts.min())} to {int(counts.max())} landmarks; take them out row by row."
        )
    left = x.shape[1] - (int(counts[0]) if len(counts) else 0)
    return x[~is_landmark].view(x.shape[0], left, *x.shape[2:])


def jumped_positions(is_landmark: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return positions that jump after each landmark by a number drawn up to `most`, int64 [B, T].

    For training: a model so learns that blocks need not stand next to each other.

    Args:
        is_landmark: bool [B, T].
        most: the largest jump, from 0.
        generator: what they are drawn with.

    Example:
        >>> marks = torch.tensor([[False, True, False, True]])
        >>> jumped_positions(marks, 0, torch.Generator()).tolist()
        [[0, 1, 2, 3]]
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise RegardError(f"most is {most!r}; it must be a whole number from 0.")
    drawn = torch.randint(most + 1, is_landmark.shape, generator=generator).to(is_landmark.device)
    jumps = (drawn * is_landmark).cumsum(-1) - drawn * is_landmark
    return torch.arange(is_landmark.shape[1], device=is_landmark.device) + jumps


def _row(ids: Tensor, labels: Tensor | None, every: int, id: int, predict: bool) -> tuple[Tensor, Tensor]:
    """One row without padding, and its labels."""
    count, step = len(ids) // every, every + 1
    at = torch.arange(len(ids), device=ids.device)
    places = at + at // every
    marks = torch.arange(1, count + 1, device=ids.device) * step - 1
    new = ids.new_full((len(ids) + count,), id)
    new[places] = ids
    if labels is None:
        return new, new
    told = torch.full_like(new, IGNORE)
    told[places] = labels
    if predict:
        told[marks] = id
    else:
        after = marks[marks + 1 < len(new)]
        told[after] = told[after + 1]
        told[after + 1] = IGNORE
    return new, told


def _checked(ids: Tensor, every: int, id: int, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Refuse what does not fit; which tokens are no padding, bool [B, T]."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise ShapeMismatch(f"ids must be int64 [batch, time], and are {list(ids.shape)}.")
    for name, x in (("labels", labels), ("mask", mask)):
        if x is not None and x.shape != ids.shape:
            raise ShapeMismatch(f"{name} must be {list(ids.shape)}, as ids, and is {list(x.shape)}.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise RegardError(f"every is {every!r}; it must be a whole number from 1.")
    if isinstance(id, bool) or not isinstance(id, int) or id < 0:
        raise RegardError(f"id is {id!r}; it must be the id of a token.")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if bool(((ids == id) & valid).any()):
        raise RegardError(f"ids hold the landmark {id} already; insert landmarks once.")
    if bool(((valid[:, 1:] != valid[:, :-1]).sum(-1) > 1).any()):
        raise RegardError("mask has padding at both ends or in the middle of a row; it must be at one end.")
    return valid
