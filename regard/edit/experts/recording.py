"""Functional token resonance: how much each expert is used while a model reads prompts.

    a[n, l, e] = sum over the tokens t of prompt n of the weight that t's router in layer l gives to expert e

0 where e is not among the chosen of t; divided by the number of tokens, unless asked otherwise. Experts that
all tokens share are not counted.

Source: Dahlke et al., 2025, arXiv 2502.11096, section 3. Status: paper only.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.edit.experts.routers import Router, routed, routers_of
from regard.errors import RegardError, ShapeMismatch

Value = Literal["weight", "count"]


def record_experts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    value: Value = "weight",
    per_token: bool = True,
    positions: Tensor | None = None,
) -> tuple[Tensor, list[int]]:
    """Return how much each prompt uses each expert.

    Args:
        model: a mixture-of-experts model of transformers, in evaluation mode.
        inputs: keyword arguments of its forward, batch N; padding is told by `attention_mask` [N, T].
        value: `weight`, or `count` for how often an expert is chosen.
        per_token: divide by the number of tokens, which prompts of different length need.
        positions: bool [N, T], which tokens count; default all that are no padding.

    Returns:
        Use, float32 [N, L, E], and the numbers of the L layers; experts beyond a layer's own are NaN.

    Raises:
        UnsupportedModel: for a model without routers.
        RegardError: for an unknown value, or a prompt of which no token counts.
        ShapeMismatch: for positions of another shape.
    """
    if value not in get_args(Value):
        raise RegardError(f"value is {value!r}; it must be one of {', '.join(get_args(Value))}.")
    routers, counted = routers_of(model), _counted(inputs, positions)
    most = max(router.experts for router in routers)
    found = torch.full((len(counted), len(routers), most), torch.nan)

    def keep(row: int, router: Router) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            _, weights, indices = routed(output, router)
            used = weights.float() if value == "weight" else torch.ones_like(weights, dtype=torch.float32)
            each = used.new_zeros(len(used), router.experts).scatter_add(1, indices, used)
            each = each.view(*counted.shape, -1) * counted[..., None]
            found[:, row, : router.experts] = each.sum(1).cpu()

        return hook

    with torch.no_grad(), ExitStack() as undo:
        for row, router in enumerate(routers):
            undo.callback(router.module.register_forward_hook(keep(row, router)).remove)
        model(**inputs)
    if per_token:
        found = found / counted.sum(1).cpu()[:, None, None]
    return found, [router.layer for router in routers]


def _counted(inputs: Mapping[str, Any], positions: Tensor | None) -> Tensor:
    ids = inputs["input_ids"]
    counted = inputs.get("attention_mask")
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted.bool()
    if positions is not None:
        if positions.shape != ids.shape:
            raise ShapeMismatch(f"positions are {list(positions.shape)} and the tokens {list(ids.shape)}.")
        counted = counted & positions.bool()
    if not bool(counted.any(1).all()):
        raise RegardError("a prompt has no token that counts.")
    return counted
