"""The routers of a mixture-of-experts model of transformers, and by what formula they choose and weigh.

A router returns (logits [N, E], weights [N, k], indices [N, k]) for N tokens. Its weights are

    softmax     p = softmax(logits), of the chosen, renormalised or not
    sigmoid     s = sigmoid(logits), chosen by s + bias within groups; renormalised or not, times a factor

which is told from the numbers that it returns. Source: the routers of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import NoSuchSite, UnsupportedModel
from regard.runtime.anatomy import root_of

NAMES = ("gate", "router")
NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
CLOSE = 2e-2


@dataclass(frozen=True, eq=False)
class Router:
    """One router.

    Attributes:
        layer: the number of its block in the model.
        module: called with hidden states.
        experts: how many it chooses from; experts that all tokens share are not among them.
        chosen: how many it chooses, k.
    """

    layer: int
    module: nn.Module
    experts: int
    chosen: int


def routers_of(model: nn.Module) -> list[Router]:
    """Return the routers of a model, by layer.

    Raises:
        UnsupportedModel: for a model without any, or with one whose sizes cannot be read.
    """
    root, found = root_of(model), []
    for name, block in root.named_modules():
        children = dict(block.named_children())
        router = next((children[n] for n in NAMES if n in children), None)
        number = NUMBER.findall(name)
        if "experts" not in children or router is None or not number:
            continue
        experts, chosen = _size(router, "num_experts", "n_routed_experts"), _size(router, "top_k")
        if experts is None or chosen is None:
            raise UnsupportedModel(f"{type(router).__name__} does not say how many experts it chooses from.")
        found.append(Router(int(number[-1]), router, experts, chosen))
    if not found:
        raise UnsupportedModel(f"{type(root).__name__} has no router: it is no mixture of experts.")
    return found


def check_experts(chosen: Sequence[tuple[int, int]], routers: Sequence[Router]) -> None:
    """Refuse experts that a model does not have.

    Raises:
        NoSuchSite: naming what there is.
    """
    known = {router.layer: router for router in routers}
    for layer, expert in chosen:
        if layer not in known:
            layers = ", ".join(map(str, known))
            raise NoSuchSite(f"layer {layer} has no router; those that have are {layers}.")
        if not 0 <= expert < known[layer].experts:
            last = known[layer].experts - 1
            raise NoSuchSite(f"layer {layer} has no expert {expert}; it has experts 0 to {last}.")


def routed(output: Any, router: Router) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a router gave, as (logits, weights, indices).

    Raises:
        UnsupportedModel: for an output of another form.
    """
    name = type(router.module).__name__
    fits = isinstance(output, tuple) and len(output) == 3 and all(isinstance(x, Tensor) for x in output)
    if not fits or output[0].shape[-1] != router.experts or output[2].shape[-1] != router.chosen:
        raise UnsupportedModel(
            f"{name} does not return (logits, weights, indices), so it cannot be followed."
        )
    if output[2].is_floating_point() or output[1].shape != output[2].shape:
        raise UnsupportedModel(f"{name} returns weights and indices that do not fit each other.")
    return output


@dataclass(frozen=True, eq=False)
class Formula:
    """How a router weighs, told from what it returned.

    Attributes:
        scores: of every expert, before any renormalisation, [N, E].
        renormalised: whether the weights of a token are scaled to a sum; they keep that sum then.
        select: scores by which experts are chosen, before groups are limited, [N, E].
        module: the router.
    """

    scores: Tensor
    renormalised: bool
    select: Tensor
    module: nn.Module

    @classmethod
    def of(cls, router: Router, logits: Tensor, weights: Tensor, indices: Tensor) -> Formula:
        """Tell the formula.

        Raises:
            UnsupportedModel: where it is none of those known.
        """
        logits = logits.float()
        bias = getattr(router.module, "e_score_correction_bias", 0.0)
        for scores, select in (
            (logits.softmax(-1), logits),
            (logits.sigmoid(), logits.sigmoid() + bias),
        ):
            ratio = weights.float() / scores.gather(-1, indices).clamp_min(1e-20)
            level = ratio / ratio.mean(-1, keepdim=True).clamp_min(1e-20)
            if bool(((level - 1).abs() < CLOSE).all()):
                same = bool(((ratio - ratio.flatten()[0]).abs() < CLOSE * ratio.flatten()[0]).all())
                factor = ratio.flatten()[0] if same else 1.0
                return cls(scores * factor, not same, select, router.module)
        name = type(router.module).__name__
        raise UnsupportedModel(f"{name} weighs experts by neither a softmax nor a sigmoid of its logits.")

    def without(self, off: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Return which experts are chosen where some are left out, [N, k], and which of these there are."""
        gone = torch.tensor(list(off), device=self.select.device)
        best = _in_groups(self.module, self.select.index_fill(-1, gone, -torch.inf)).topk(count, -1)
        return best.indices, best.values > -torch.inf

    def weigh(self, indices: Tensor, wanted: Tensor, total: Tensor) -> Tensor:
        """Return the weights of other experts.

        Args:
            indices: [N, k].
            wanted: bool [N, k], which of them count; the others get 0.
            total: the sum that renormalised weights keep, [N, 1].
        """
        found = self.scores.gather(-1, indices) * wanted
        if not self.renormalised:
            return found
        size = found.sum(-1, keepdim=True)
        return torch.where(size > 0, found * total / size.clamp_min(1e-20), 0.0)


def _in_groups(module: nn.Module, select: Tensor) -> Tensor:
    """Leave out experts of groups that a group-limited router would not choose from."""
    groups, kept = _size(module, "num_group", "n_group"), _size(module, "topk_group")
    if not groups or groups == 1 or kept is None:
        return select
    parts = select.unflatten(-1, (groups, -1))
    best = parts.topk(min(2, parts.shape[-1]), -1).values.sum(-1).topk(kept, -1).indices
    allowed = torch.zeros(parts.shape[:-1], dtype=torch.bool, device=select.device).scatter(-1, best, True)
    return parts.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)


def _size(module: nn.Module, *names: str) -> int | None:
    found = [getattr(module, name, None) for name in names]
    return next((int(x) for x in found if isinstance(x, int)), None)
