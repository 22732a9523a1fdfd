"""The clean and the corrupt side of prompts, and how they score."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.prefix import check_unpadded
from regard.runtime.recorded import logits_of

Scored = Callable[[Tensor], Tensor]
LEAST = 1e-3


def after_prefix(root: nn.Module, ids: Tensor, prefix: Any) -> dict[str, Any]:
    """Return the inputs of a forward of tokens after a prefix, of whose logits the last are needed."""
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": prefix}
    if "logits_to_keep" in inspect.signature(root.forward).parameters:
        inputs["logits_to_keep"] = 1
    return inputs


def last_logits_of(root: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits [N, V] at the end of prompts [N, T]."""
    with torch.no_grad():
        return logits_of(root, root(input_ids=ids, use_cache=False))[:, -1]


def scored(metric: Scored, logits: Tensor, count: int) -> Tensor:
    """Return the metric of prompts, float32 [N].

    Raises:
        ShapeMismatch: where it does not give one number a prompt.
    """
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape != (count,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeMismatch(f"the metric gave {found} for {count} prompts; it must give a tensor, one each.")
    return value.float().cpu()


def require_change(scores: Sequence[Tensor]) -> float:
    """Return the mean change of the metric from the clean to the corrupt prompts.

    Args:
        scores: [N] of either.

    Raises:
        RegardError: where it is less than 0.001, so that there is nothing to explain.
    """
    gap = float((scores[1] - scores[0]).mean())
    if not abs(gap) >= LEAST:
        raise RegardError(
            f"the metric is {float(scores[0].mean()):.4f} on the clean and {float(scores[1].mean()):.4f} on "
            "the corrupt prompts, so there is nothing to explain."
        )
    return gap


def aligned_sides(clean: Mapping[str, Tensor], corrupt: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the token ids [N, T] of both sides.

    Raises:
        RegardError: for padded prompts.
        ShapeMismatch: for prompts of different lengths.
    """
    sides = [check_unpadded(clean, "clean"), check_unpadded(corrupt, "corrupt")]
    if sides[0].shape != sides[1].shape:
        raise ShapeMismatch(
            f"clean is {list(sides[0].shape)} and corrupt {list(sides[1].shape)}; their positions must "
            "answer to each other."
        )
    return sides
