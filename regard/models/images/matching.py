"""Baselines of equal size: a model whose one width is chosen so that its parameters are those asked for."""

from __future__ import annotations

from typing import Any

import torch

from regard.errors import RegardError
from regard.models.images.registry import image_model

MOST = 2**16


def matched(
    name: str, parameters: int, vary: str, within: float = 0.03, step: int = 1, **options: Any
) -> Any:
    """Return the config of a model with as many parameters as another, nearly.

    Args:
        name: as `image_models()` lists them.
        parameters: to come near to.
        vary: the option that is chosen, a width with which parameters grow, such as "intermediate_size".
        within: how far off the parameters may be, as a share.
        step: of which the width is a multiple, as of the number of heads.
        options: further ones of the config.

    Raises:
        RegardError: where no width comes near enough.

    Example:
        >>> config = matched("vit-nano", 1_000_000, "intermediate_size", num_labels=10)
        >>> config.intermediate_size
        698
    """
    low, high = 1, MOST // step
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (middle + 1, high) if _count(name, vary, step * middle, options) < parameters else (low, middle)
        )
    best = min((max(1, low - 1), low), key=lambda n: abs(_count(name, vary, step * n, options) - parameters))
    found = _count(name, vary, step * best, options)
    if abs(found - parameters) > within * parameters:
        raise RegardError(
            f"{name} with {vary}={step * best} has {found:,} parameters, and none comes within "
            f"{100 * within:g} % of {parameters:,}; vary another option."
        )
    return _hollow(name, vary, step * best, options).config


def _count(name: str, vary: str, width: int, options: dict[str, Any]) -> int:
    return sum(p.numel() for p in _hollow(name, vary, width, options).parameters())


def _hollow(name: str, vary: str, width: int, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return image_model(name, **{**options, vary: width})
