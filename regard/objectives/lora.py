"""LoRA fine-tuning of a language model on prompts and answers, that goes on after it was killed.

    W x  ->  W x + (scale) B A x          A [r, in], B [out, r] trained, B = 0 at first; W stays
    loss = mean cross-entropy of the tokens of the answer alone

The adapters are PEFT's, on the linear maps inside the blocks chosen; blocks before the first of these need no
gradient. Pairs are put into batches once, which come in another order every time through. What is kept in the
file is the adapters and what the optimiser knows of them, a few MB.

Source: Hu et al., 2021, arXiv 2106.09685; PEFT. Status: our choice of optimiser and schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError
from regard.objectives.checkpoint import Log
from regard.objectives.loop import Loop, Tick
from regard.objectives.schedule import Schedule, check_count, device_of, mixed
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.replay import Replay

Pair = tuple[str, str]
Row = tuple[list[int], int]
IGNORED = -100
RANK, STEPS, BATCH, RATE = 8, 40, 8, 1e-3


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(Schedule):
    """How to fine-tune; see `Schedule`."""

    steps: int = STEPS
    batch: int = BATCH
    rate: float = RATE
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


def add_lora(
    model: nn.Module,
    *,
    rank: int = RANK,
    scale: float = 2.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Any:
    """Return a model with fresh adapters in it, as PEFT wraps it; `.unload()` takes them out again.

    Args:
        model: a causal language model of transformers.
        rank: of the adapters.
        scale: by which they are multiplied; PEFT's `lora_alpha` over the rank.
        layers: numbers of the blocks that get them; default the upper half.
        seed: of what they begin with.

    Raises:
        RegardError: where PEFT is missing, for a rank below 1, no layers, or a model that has adapters.
        NoSuchSite: for a block that is not there.
    """
    config, wrap = _peft()
    check_count("rank", rank, 1)
    if hasattr(model, "peft_config"):
        raise RegardError("this model has adapters already; take them out with `.unload()` first.")
    anatomy = anatomy_of(root_of(model))
    depth = len(anatomy.blocks())
    chosen = list(range(depth // 2, depth)) if layers is None else list(layers)
    blocks = {id(anatomy.block(layer)) for layer in chosen}
    inside = [name for name, block in anatomy.blocks() if id(block) in blocks]
    names = [
        f"{block}.{name}"
        for block in inside
        for name, module in anatomy.root.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    if not names:
        raise RegardError(f"layers is {chosen}; there is no linear map in them to adapt.")
    options = config(r=rank, lora_alpha=scale * rank, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrap(model, options)


def tune_answers(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    *,
    recipe: LoraRecipe | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    evaluate_every: int | None = None,
    checkpoint_every: int = 20,
    replay: bool = False,
    about: Mapping[str, Any] | None = None,
    tick: Tick | None = None,
    **options: Any,
) -> Log:
    """Fine-tune what a model trains, such as its adapters, in place, and return how it went.

    Args:
        model: of `add_lora`.
        tokenizer: of the model.
        pairs: (prompt, answer); answers begin with a space where one belongs there.
        held_out: others, whose loss is measured.
        recipe, options: fields of `LoraRecipe`, as in `steps=40, rate=1e-3, seed=1`.
        out: folder for `checkpoint.safetensors`; the same call goes on from it. None keeps nothing.
        resume, checkpoint_every, tick: as for `regard.objectives.train`.
        evaluate_every: steps between held-out losses; default at the beginning and the end alone.
        replay: run the blocks below the first adapter once for every batch and keep what they give, which is
            what makes several times through the pairs cheap; the model must be one that `Replay` takes.
        about: what the data is, as JSON holds it; a file of another is refused by it.

    Raises:
        RegardError: for no pairs, an empty answer, an option that will not do, a file of another training, or
            a loss that is not finite.

    Example:
        >>> tuned = add_lora(model, rank=4, seed=1)                                 # doctest: +SKIP
        >>> tune_answers(tuned, tokenizer, pairs, held_out, out="tuned", steps=40)  # doctest: +SKIP
        >>> tuned.save_pretrained("tuned")                                          # doctest: +SKIP
    """
    recipe = recipe or LoraRecipe.of("tune_answers", **options)
    kept, checked = (
        _read(tokenizer, some, name) for some, name in ((pairs, "pairs"), (held_out, "held_out"))
    )
    told = {"recipe": asdict(recipe), "pairs": len(kept), "about": dict(about or {})}
    batches = _Batches(kept, recipe)
    logits = _Replayed(model) if replay else partial(_logits, model)

    def descend(step: int) -> float:
        number, rows = batches.at(step)
        inputs, target = _inputs(rows, device_of(model))
        loss = _loss(logits(inputs, f"trained {number}"), target)
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def judge() -> tuple[float, dict[str, float]]:
        total = 0.0
        for start in range(0, len(checked), recipe.batch):
            inputs, target = _inputs(checked[start : start + recipe.batch], device_of(model))
            total += float(_loss(logits(inputs, f"held out {start}"), target)) * len(target)
        return total / len(checked), {}

    model.eval()
    loop = Loop(
        model=OnlyTrained(model), recipe=recipe, descend=descend, judge=judge, told=told, out=out,
        resume=resume, evaluate_every=evaluate_every or recipe.steps, checkpoint_every=checkpoint_every,
        tick=tick,
    )  # fmt: skip
    return loop.run()


class _Batches:
    """Rows of a step. They are put together once, and come in another order every time through."""

    def __init__(self, rows: Sequence[Row], recipe: LoraRecipe) -> None:
        order = _drawn(len(rows), recipe.seed)
        whole = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
        self.rows, self.recipe = rows, recipe
        self.batches = [batch for batch in whole if len(batch) == len(whole[0])]

    def at(self, step: int) -> tuple[int, list[Row]]:
        time, place = divmod(step, len(self.batches))
        number = _drawn(len(self.batches), mixed(self.recipe.seed, time + 1))[place]
        return number, [self.rows[i] for i in self.batches[number]]


def _drawn(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class _Replayed:
    """Logits of batches, of which the blocks below the first that is trained are run once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = root_of(model)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        blocks = [block for _, block in anatomy_of(self.model).blocks()]
        inside = [any(id(p) in trained for p in block.parameters()) for block in blocks]
        self.first = inside.index(True) if any(inside) else 0
        self.known: dict[str, Replay] = {}

    def __call__(self, inputs: dict[str, Any], name: str) -> Tensor:
        self.model.eval()
        if name not in self.known:
            self.known[name] = Replay(self.model, inputs)
        return self.known[name].run(self.first, grad=torch.is_grad_enabled())


def _logits(model: nn.Module, inputs: dict[str, Any], name: str) -> Tensor:
    return model(**inputs, use_cache=False).logits


def _inputs(rows: Sequence[Row], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a forward, padded on the left so that answers end together, and their tokens [B, A]."""
    width, most = max(len(ids) for ids, _ in rows), max(count for _, count in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, target = torch.zeros_like(ids), torch.full((len(rows), most), IGNORED)
    for row, (one, count) in enumerate(rows):
        ids[row, width - len(one) :], mask[row, width - len(one) :] = torch.tensor(one), 1
        target[row, most - count :] = torch.tensor(one[-count:])
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "logits_to_keep": most + 1}
    return inputs, target.to(device)


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the tokens of answers [B, A], of logits [B, A + 1, V]."""
    told = logits[:, -target.shape[1] - 1 : -1].flatten(0, 1).float()
    return F.cross_entropy(told, target.flatten(), ignore_index=IGNORED)


class OnlyTrained(nn.Module):
    """A model whose weights, as a file keeps them, are those that are trained.

    Args:
        model: with `requires_grad` set where it is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        mine = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        wrong = sorted(set(mine) ^ set(weights)) or [n for n in mine if mine[n].shape != weights[n].shape]
        if wrong:
            raise RuntimeError(f"OnlyTrained:\n\tweights differ in {wrong[0]}")
        for name, parameter in mine.items():
            parameter.copy_(weights[name])


def _read(tokenizer: Any, pairs: Sequence[Pair], name: str) -> list[Row]:
    if not len(pairs):
        raise RegardError(f"{name} is empty; give prompts with answers.")
    found = []
    for prompt, answer in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not before or not after:
            raise RegardError(
                f"{name} has the prompt {prompt!r} with the answer {answer!r}; neither may be empty."
            )
        found.append((before + after, len(after)))
    return found


def _peft() -> tuple[Any, Any]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as missing:
        raise RegardError('LoRA needs PEFT; run `pip install "regard[peft]"`.') from missing
    return LoraConfig, get_peft_model
