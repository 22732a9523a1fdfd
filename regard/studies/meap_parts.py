"""What the study of MEAP trains and measures: small models, three arms, and where attention goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention import Softmax
from regard.attention.mechanism import Mechanism
from regard.models.tiny import Heads, TinyModel
from regard.objectives.meap_objective import MEAP
from regard.objectives.schedule import Schedule, mixed
from regard.tasks.filler_facts import FillerFacts, Sequences

TASK = FillerFacts(
    length=64, symbols=8, facts=4, keys=8, values=8, questions=4, sharpness=0.1, text=60_000
)  # fmt: skip
MASK = TASK.vocabulary
WIDTH, LAYERS, HEADS, BATCH, RATE, RATIO = 64, 2, 4, 32, 5e-3, 0.15
HELD_OUT, NOISE = 2**40, 2**41


def model_of(seed: int) -> TinyModel:
    """Return the model that all arms of a seed begin with."""
    torch.manual_seed(seed)
    heads = [Heads(WIDTH, HEADS, WIDTH // HEADS, Softmax().build()) for _ in range(LAYERS)]
    return TinyModel(TASK.vocabulary + 1, WIDTH, heads)


def corrupted(arm: str, inputs: Tensor, seed: int, step: int, ratio: float = RATIO) -> Tensor:
    """Return the inputs of a step as an arm reads them."""
    if arm == "plain":
        return inputs
    hidden, where = MEAP(mask_id=MASK, ratio=ratio, seed=seed).hide(inputs, step=step)
    if arm == "meap":
        return hidden
    generator = torch.Generator().manual_seed(mixed(NOISE + seed, step))
    noise = torch.randint(TASK.vocabulary, inputs.shape, generator=generator)
    return torch.where(where, noise, inputs)


def descend(
    model: nn.Module, optimiser: torch.optim.Optimizer, recipe: Schedule, arm: str, seed: int, step: int,
    ratio: float = RATIO,
) -> None:  # fmt: skip
    """Train a model by one step; batches depend on the seed and the step alone."""
    tokens = TASK.batch(BATCH, torch.Generator().manual_seed(mixed(seed, step))).tokens
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate_at(step)
    logits = model(corrupted(arm, tokens[:, :-1], seed, step, ratio))
    optimiser.zero_grad()
    F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimiser.step()


def exact(seed: int, steps: int) -> dict[str, float]:
    """Return how far weights are from plain training's, at ratio 0 and at 0.15."""
    recipe = Schedule(steps=steps, batch=BATCH, rate=RATE)
    ends = []
    for arm, ratio in (("plain", 0.0), ("meap", 0.0), ("meap", RATIO)):
        model = model_of(seed)
        optimiser = recipe.optimiser(model)
        for step in range(steps):
            descend(model, optimiser, recipe, arm, seed, step, ratio)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    plain, same, changed = ends
    return {"same": float((same - plain).abs().max()), "changed": float((changed - plain).abs().max())}


def trained(
    arm: str, seed: int, steps: int, every: int, held_out: int, tick: Callable[[float], None]
) -> dict[str, Any]:
    """Train an arm.

    Returns:
        `steps` evaluated at; `answers` and clean `filler` loss then; `depths`, right answers by quarter of
        the text then; and at the end `masked`, `spread`, `fact`, `fact_even`, see `attention`.
    """
    model, recipe = model_of(seed), Schedule(steps=steps, batch=BATCH, rate=RATE)
    optimiser = recipe.optimiser(model)
    made = TASK.batch(held_out, torch.Generator().manual_seed(mixed(HELD_OUT, seed)), held_out=True)
    told: dict[str, Any] = {"steps": [], "answers": [], "filler": [], "depths": []}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            for name, value in (("steps", step), *evaluated(model, made).items()):
                told[name].append(value)
            tick(step / steps)
        if step < steps:
            descend(model, optimiser, recipe, arm, seed, step)
    return {**told, **attention(model, made, seed)}


@torch.no_grad()
def evaluated(model: nn.Module, made: Sequences) -> dict[str, Any]:
    """Return the share of right answers, in all and by quarter of the text, and the loss on filler."""
    logits, targets = model(made.tokens[:, :-1]), made.tokens[:, 1:]
    right = TASK.right(logits, made).float()
    quarter = (made.depths * 4).long().clamp(max=3)
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return {
        "answers": float(right.mean()),
        "filler": float(loss[targets < TASK.symbols].mean()),
        "depths": [round(float(right[quarter == n].mean()), 4) for n in range(4)],
    }


@torch.no_grad()
def attention(model: nn.Module, made: Sequences, seed: int) -> dict[str, float]:
    """Return where attention goes, mean over layers, heads and sequences.

    `masked` and `spread` as `regard.lens.span_focus` defines `on` and `spread`, on inputs of which the same
    15 % are hidden for every arm; `fact` the attention from the key of a question on the two tokens of its
    fact, on clean inputs, and `fact_even` what even attention would give.
    """
    inputs = made.tokens[:, :-1]
    hidden, where = MEAP(mask_id=MASK, ratio=RATIO, seed=mixed(HELD_OUT, seed)).hide(inputs, step=0)
    seen = torch.arange(inputs.shape[1], 0, -1).float()
    alpha = torch.stack([weights.sum(2) / seen for weights in matrices(model, hidden)])  # [L, B, H, T]
    on, off = ((keys / keys.sum(1, keepdim=True))[None, :, None] for keys in (where, ~where))
    mean = (alpha * off).sum(-1)
    spread = ((alpha - mean[..., None]).square() * off).sum(-1)
    asked = (made.answers - 1)[:, None, :, None]
    facts = [
        weights.gather(2, asked.expand(-1, HEADS, -1, inputs.shape[1]))
        .gather(3, torch.stack([made.places - 1, made.places], -1)[:, None].expand(-1, HEADS, -1, -1))
        .sum(-1)
        for weights in matrices(model, inputs)
    ]
    return {
        "masked": float((alpha * on).sum(-1).mean()),
        "spread": float(spread.mean()),
        "fact": float(torch.stack(facts).mean()),
        "fact_even": float((2 / made.answers).mean()),
    }


def matrices(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return the attention of each layer, [B, H, T, T], on inputs [B, T]."""
    found: list[Tensor] = []

    def hook(module: Any, given: tuple[Any, ...], out: Tensor) -> None:
        found.append(module.matrix(*given[:2]))

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, Mechanism)]
    try:
        model(inputs)
    finally:
        for one in hooks:
            one.remove()
    return found
