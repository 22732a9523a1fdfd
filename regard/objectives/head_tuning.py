"""Continue-tuning of a pretrained model to mixture of heads: dense first, then with its heads routed.

    1. the model is trained further as it is, so that what the new text brings is learned without routing
    2. heads are routed (`apply_moh`), and it is trained on:   loss = next-token loss + beta balance

where balance is the mean over layers of the load-balance loss, see `regard.attention.head_router`.

Source: Jin et al., 2024, arXiv 2410.11842, section 4.4 (LLaMA3-8B: 300B tokens dense, 100B routed, beta
0.01). Status: paper only: the training code of that model is not public, and optimiser and schedule are
those of `regard.objectives.language`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.head_router import Kind, Preset
from regard.attention.moh.balance import balance_loss
from regard.attention.placed_routers import apply_moh, remove_moh
from regard.errors import RegardError
from regard.objectives.checkpoint import Log
from regard.objectives.language import Loss, Recipe, next_token_loss, train
from regard.tasks.corpus import Corpus

BETA = 0.01


@dataclass(frozen=True)
class HeadTuning:
    """How a model was tuned.

    Attributes:
        dense: of the first stage, None where it had no steps.
        routed: of the second.
    """

    dense: Log | None
    routed: Log


def balanced(loss: Loss = next_token_loss, beta: float = BETA) -> Loss:
    """Return a loss with `beta` times the load-balance loss of the model added, in training.

    Raises:
        RegardError: where beta is not a number from 0.

    Example:
        >>> from regard.models.decoder import Decoder
        >>> from regard.attention.moh import MixtureOfHeads
        >>> spec = MixtureOfHeads(dim=16, heads=4, shared=1, active=2)
        >>> model = Decoder(256, dim=16, layers=1, heads=4, mechanism=spec)
        >>> tokens = torch.randint(256, (2, 9))
        >>> bool(balanced()(model, tokens) > next_token_loss(model, tokens))
        True
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not math.isfinite(beta) or beta < 0:
        raise RegardError(f"beta is {beta!r}; it must be a number from 0.")

    def both(model: nn.Module, tokens: Tensor) -> Tensor:
        value = loss(model, tokens)
        if not (beta and model.training and torch.is_grad_enabled()):
            return value
        return value + beta * balance_loss(model).to(value.device)

    return both


def tune_heads(
    model: nn.Module,
    data: Corpus,
    shared: int | Sequence[int],
    active: int | Sequence[int],
    kind: Kind = "query_norm",
    *,
    steps: int,
    dense_steps: int = 0,
    beta: float = BETA,
    preset: Preset = "official",
    sparse: bool | None = None,
    out: str | Path | None = None,
    tick: Callable[[float], None] | None = None,
    windows: int = 64,
    **options: Any,
) -> HeadTuning:
    """Turn a pretrained model into mixture of heads, in place, by the recipe of the paper.

    Args:
        model: of transformers, as `apply_moh` takes it.
        data: text in the model's own tokens.
        shared, active, kind, preset, sparse: as for `apply_moh`.
        steps: of training with routed heads.
        dense_steps: of training before that.
        beta: weight of the load-balance loss; 0 leaves it out.
        out: folder for the files of both stages, from which the same call goes on.
        tick: called with the share of all steps that is done, in place of a progress bar.
        windows: held-out sequences that are read before and after each stage.
        options: fields of `Recipe`, as in `rate=1e-5, batch=1`; the same in both stages.

    Raises:
        UnsupportedModel, NoSuchSite: as `apply_moh`, before anything is trained.
        RegardError: where an argument will not do.

    Example:
        >>> model, tokenizer = regard.load()    # doctest: +SKIP
        >>> tune_heads(model, data, 4, 3, steps=1000, dense_steps=1000, rate=1e-5)    # doctest: +SKIP
        >>> model.save_pretrained("routed")    # doctest: +SKIP
    """
    loss = balanced(beta=beta)
    recipe = Recipe(steps=steps, **options)
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        raise RegardError(f"dense_steps is {dense_steps!r}; it must be a whole number from 0.")

    def route() -> None:
        apply_moh(model, shared, active, kind, preset=preset, sparse=sparse)

    route()
    remove_moh(model)
    folder, total = None if out is None else Path(out), steps + dense_steps
    told: dict[str, Any] = {"windows": windows}
    dense = None
    if dense_steps:
        dense = train(
            model, data, recipe=Recipe(steps=dense_steps, **options), evaluate_every=dense_steps,
            out=None if folder is None else folder / "dense", tick=_part(tick, 0, dense_steps, total), **told,
        )  # fmt: skip
    route()
    about = {"shared": shared, "active": active, "kind": kind, "preset": preset, "beta": beta}
    routed = train(
        model, data, recipe=recipe, evaluate_every=steps, loss=loss, about=about,
        out=None if folder is None else folder / "routed", tick=_part(tick, dense_steps, steps, total),
        **told,
    )  # fmt: skip
    return HeadTuning(dense, routed)


def _part(
    tick: Callable[[float], None] | None, before: int, steps: int, total: int
) -> Callable[[float], None] | None:
    if tick is None:
        return None
    whole = tick
    return lambda done: whole((before + done * steps) / total)
