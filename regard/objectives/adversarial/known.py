"""A loss whose gradients are known already, so that its graph need not be gone through again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_known_gradients(value: Tensor, trained: Sequence[Tensor], gradients: Sequence[Any]) -> Tensor:
    """Return a scalar of this value whose gradients are those given.

    Args:
        value: of the loss, a scalar.
        trained: parameters.
        gradients: of each, or None where the loss does not depend on it.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> (3 * with_known_gradients(torch.tensor(5.0), [w], [torch.tensor([1.0, 2.0])])).backward()
        >>> w.grad
        tensor([3., 6.])
    """
    return _Known.apply(value.detach(), tuple(gradients), *trained)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *trained: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        up = above[0]
        return None, None, *[None if g is None else g.mul_(up) for g in ctx.gradients]
