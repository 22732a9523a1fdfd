"""The language part of the study of mixture of heads: SmolLM2, trained further, with its heads routed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.attention.moh import apply_moh, head_usage
from regard.objectives.head_tuning import BETA, balanced
from regard.objectives.language import next_token_loss, train
from regard.runtime.anatomy import anatomy_of
from regard.studies.texts import late_loss, subject, windows

if TYPE_CHECKING:
    from regard.studies.mixture_of_heads import Size
    from regard.tasks.corpus import Corpus

RATE, WIDE, SHARED, ACTIVE = 2e-4, 9, 4, 3
ROUTED = ("query_norm", "output_norm", "random", "learned")
Tick = Callable[[float], None]


class Language:
    """SmolLM2 and its text, and what it becomes in the dense stage, made when it is first asked for.

    Attributes:
        rows: held-out windows, int64 [N, length + 1].
    """

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed
        model, _, self.data = subject(size.tiny)
        self.model: nn.Module = attention_alone(model)
        self.rows = windows(self.data.held_out, size.length, size.windows)
        self._adapted: nn.Module | None = None

    def untuned(self, seed: int) -> dict[str, Any]:
        """Return losses of the windows with the heads of the model as it came routed each way."""
        found: dict[str, Any] = {"plain": losses(self.model, self.rows)}
        for way in ("query_norm", "output_norm", "random", "magnitude", "full"):
            torch.manual_seed(seed)
            model = route(copy.deepcopy(self.model), way)
            found[way] = losses(model, self.rows)
            if way == "query_norm":
                found["even"] = evenness(model, self.rows)
        return found

    def tuned(self, way: str, tick: Tick) -> dict[str, Any]:
        """Return losses before and after the routed stage, and how evenly heads are used after it."""
        size = self.size
        kind, beta = (way.removesuffix("_loose"), 0.0) if way.endswith("_loose") else (way, BETA)
        model = copy.deepcopy(self.adapted(lambda done: tick(0.3 * done)))
        torch.manual_seed(self.seed)
        if kind != "dense":
            route(model, kind)
        before = losses(model, self.rows)
        goal = balanced(beta=beta) if kind in ("query_norm", "learned") else next_token_loss
        further(
            model,
            self.data,
            size.tuning_steps,
            size.length,
            1 + self.seed,
            goal,
            lambda done: tick(0.3 + 0.7 * done),
        )
        torch.manual_seed(self.seed)
        found: dict[str, Any] = {"before": before, "after": losses(model, self.rows)}
        if kind in ROUTED:
            found["even"] = evenness(model, self.rows)
        return found

    def adapted(self, tick: Tick) -> nn.Module:
        """Return the model after the dense stage."""
        if self._adapted is None:
            made, size = copy.deepcopy(self.model), self.size
            further(made, self.data, size.dense_steps, size.length, self.seed, next_token_loss, tick)
            self._adapted = made
        return self._adapted


def attention_alone(model: nn.Module) -> nn.Module:
    """Let the weights of attention be trained, and no others."""
    model.requires_grad_(False)
    for site in anatomy_of(model).sites:
        site.module.requires_grad_(True)
    return model


def further(
    model: nn.Module, data: Corpus, steps: int, length: int, seed: int, goal: Any, tick: Tick
) -> None:
    """Train a model a few steps more."""
    train(
        model, data, steps=steps, batch=1, length=length, rate=RATE, windows=1, seed=seed,
        evaluate_every=steps, loss=goal, tick=tick,
    )  # fmt: skip


def losses(model: nn.Module, rows: Tensor) -> list[float]:
    return [late_loss(model, row[None]) for row in rows]


def route(model: nn.Module, way: str) -> nn.Module:
    """Let tokens use 7 of 9 heads, or about as large a share of other numbers, chosen one way; in place."""
    heads = {anatomy_of(model).output_weight(site).shape[1] for site in anatomy_of(model).sites}.pop()
    active = max(1, round(heads * ACTIVE / WIDE))
    shared = min(round(heads * SHARED / WIDE), heads - active - 1)
    if way == "magnitude":
        prune(model, heads - shared - active)
    elif way == "full":
        apply_moh(model, shared, heads - shared, "query_norm", sparse=False)
    else:
        apply_moh(model, shared, active, way, sparse=False)  # type: ignore[arg-type]
    return model


def prune(model: nn.Module, count: int) -> None:
    """Switch off, in every layer, the heads whose weights W_O W_V are smallest, for good."""
    anatomy = anatomy_of(model)
    for site in anatomy.sites:
        weight = anatomy.output_weight(site).detach()  # [dim, H, D]
        heads, width = weight.shape[1:]
        values: Any = site.module.v_proj
        own = values.weight.detach().unflatten(0, (-1, width))  # [Hkv, D, dim]
        own = own.repeat_interleave(heads // len(own), 0)
        sizes = (weight.transpose(0, 1) @ own).flatten(1).norm(dim=1)
        on = torch.ones(heads).index_fill(0, sizes.argsort()[:count], 0)
        anatomy.output_projection(site).register_forward_pre_hook(_silencer(on))


def _silencer(on: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def silence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        heads = args[0].unflatten(-1, (len(on), -1))
        return ((heads * on[:, None]).flatten(-2), *args[1:])

    return silence


@torch.no_grad()
def evenness(model: nn.Module, rows: Tensor) -> list[float]:
    """Return, for each window, the entropy of the use of routed heads, over its largest; mean over layers."""
    found = []
    for row in rows:
        with head_usage(model) as usage:
            model(row[None, :-1])
        found.append(sum(usage.entropy.values()) / len(usage.entropy))
    return found
