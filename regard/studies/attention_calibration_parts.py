"""What the study of attention calibration does to a model: ACT, its controls, and their scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import regard
from regard.edit import ACT, redistribute
from regard.edit.act import filter_heads, sink_map
from regard.engines.rows import RowBlock
from regard.runtime import Edit, Lens
from regard.runtime.anatomy import anatomy_of
from regard.runtime.call import Call
from regard.runtime.edits import targets
from regard.runtime.edits.targets import HeadName
from regard.runtime.protocol import Wanted
from regard.studies.paired import compare_paired
from regard.tasks.sentiment import ANSWERS, sentiment

TEMPERATURES = tuple(1.15**n for n in range(25))
BATCH = 16
FITTED, DRAWS = 0.4, 3
TREATED = ("filtered", "first", "temperature", "all", "delete_hidden", "delete_first")


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstSink(Edit):
    """ACT with the first token in place of the hidden sinks."""

    heads: Sequence[HeadName]
    beta: float = FITTED

    def wants(self, call: Call) -> Wanted | None:
        here = targets.heads_here(call, self.heads)
        return Wanted(heads=here) if here else None

    def weights(self, block: RowBlock) -> Tensor:
        where = targets.columns(block, targets.heads_here(block.call, self.heads))
        first = (block.key_positions == 0)[:, None, None]
        new = redistribute(targets.pick(block.weights, where), first, None, 1 - self.beta)
        return targets.put(block.weights, where, new)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tempered(Edit):
    """Heads at a temperature each."""

    temperatures: Mapping[HeadName, float]

    def wants(self, call: Call) -> Wanted | None:
        here = targets.heads_here(call, self.temperatures)
        return Wanted(heads=here) if here else None

    def scores(self, block: RowBlock) -> Tensor:
        here = targets.heads_here(block.call, self.temperatures)
        own = [t for (layer, _), t in self.temperatures.items() if block.site.named(layer, block.call.main)]
        where = targets.columns(block, here)
        new = targets.pick(block.scores, where) / targets.stack_factors(own, block.scores)
        return targets.put(block.scores, where, new)


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved(Lens):
    """How much weight an edit of the weights moves in a row, and how much each temperature would."""

    heads: Sequence[HeadName]

    def wants(self, call: Call) -> Wanted | None:
        here = targets.heads_here(call, self.heads)
        return Wanted(heads=here) if here else None

    def weights(self, block: RowBlock) -> None:
        here = targets.heads_here(block.call, self.heads)
        where = targets.columns(block, here)
        scores, now = (targets.pick(x, where) for x in (block.scores, block.weights))
        before = torch.softmax(scores, -1)
        real = (
            torch.ones(now.shape[0], now.shape[2]) if block.valid_rows is None else block.valid_rows.float()
        )

        def moved(weights: Tensor) -> Tensor:
            return ((weights - before).abs().sum(-1) * real[:, None]).sum((0, 2)) / 2

        found = torch.stack([moved(now), *(moved(torch.softmax(scores / t, -1)) for t in TEMPERATURES)], 1)
        for number, head in enumerate(here):
            self.tally.mean(block.site, f"head {head}", found[number], float(real.sum()))

    def result(self) -> Moved:
        return self

    def temperature(self, layer: str, head: int) -> float:
        """Return the least temperature that moves as much in a head as the edit did."""
        found = self.tally.get(f"head {head}")[layer]
        enough = (found[1:] >= found[0]).nonzero()
        return TEMPERATURES[int(enough[0])] if len(enough) else TEMPERATURES[-1]


@dataclass(frozen=True)
class Asked:
    """Prompts as a model reads them; `sign` is 1 where the answer is positive, else -1."""

    inputs: list[dict[str, Tensor]]
    sign: Tensor

    @classmethod
    def of(cls, tokenizer: Any, prompts: Sequence[tuple[str, int]], batch: int = BATCH) -> Asked:
        """Tokenize prompts in batches, padded on the left."""
        texts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
        inputs = [tokenizer([text for text, _ in some], **options) for some in texts]
        kept = [{name: some[name] for name in ("input_ids", "attention_mask")} for some in inputs]
        return cls(kept, torch.tensor([2.0 * label - 1 for _, label in prompts]))


def one_seed(
    model: nn.Module, tokenizer: Any, size: Any, seed: int, tick: Callable[[float], None]
) -> dict[str, Any]:
    """Choose heads on one set of prompts, and score every treatment on another.

    Returns:
        `margins`: treatment -> of the two answers' logits on the test, positive minus negative, and
        `centre`, the same midway between the two classes of the calibration prompts; `sign` of the test;
        `heads` kept with their gains, `chance`, and `temperatures`.
    """
    data = sentiment(size.calibration, size.test, seed=seed)
    calibration = Asked.of(tokenizer, data.calibration, batch=size.calibration)
    test = Asked.of(tokenizer, data.test)
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]

    def right(logits: Tensor) -> Tensor:
        return ((logits[:, answers[1]] - logits[:, answers[0]]) * calibration.sign > 0).float()

    tried = filter_heads(model, calibration.inputs[0], right, edit=ACT(layers=size.layers), progress=False)
    tick(0.7)
    kept = tried.chosen()
    edits = treatments(model, calibration.inputs[0], tried.heads.names, kept, seed)
    margins, centre = {}, {}
    for number, (name, some) in enumerate(edits.items()):
        centre[name] = middle(margins_of(model, calibration, answers, some), calibration.sign)
        margins[name] = margins_of(model, test, answers, some).tolist()
        tick(0.7 + 0.3 * (number + 1) / len(edits))
    return {
        "margins": margins, "centre": centre, "sign": test.sign.tolist(),
        "heads": [[site, head, tried.heads.at(site, head)["gain"]] for site, head in kept],
        "tried": len(tried.heads), "plain": tried.heads.about["plain"], "chance": list(tried.by_chance()),
        "temperatures": list(edits["temperature"][0].temperatures.values()) if kept else [],
    }  # fmt: skip


def treatments(
    model: nn.Module,
    inputs: dict[str, Tensor],
    tried: Sequence[HeadName],
    kept: Sequence[HeadName],
    seed: int,
) -> dict[str, list[Any]]:
    """Return what is done to the model, by name; where no head is kept, what needs heads does nothing."""
    everywhere = ACT().each(anatomy_of(model))
    found: dict[str, list[Any]] = {
        "plain": [],
        "filtered": [ACT(kept)] if kept else [],
        "first": [FirstSink(heads=kept)] if kept else [],
        "temperature": [Tempered(temperatures=temperatures(model, inputs, kept))] if kept else [],
        "all": [ACT(everywhere)],
        "delete_hidden": [ACT(everywhere, beta=0.0)],
        "delete_first": [FirstSink(heads=everywhere, beta=0.0)],
    }
    others = [head for head in tried if head not in kept]
    for draw in range(DRAWS):
        some = random.Random(f"heads/{seed}/{draw}").sample(others, min(len(kept), len(others)))
        found[f"random {draw}"] = [ACT(some)] if some else []
    return found


def temperatures(
    model: nn.Module, inputs: dict[str, Tensor], kept: Sequence[HeadName], **options: Any
) -> dict[Any, float]:
    """Return the temperature of each head that moves as much weight in a row as ACT does there."""
    lens = Moved(heads=kept)
    with torch.no_grad(), regard.steer(model, ACT(kept, **options)), regard.watch(model, lens) as seen:
        model(**inputs)
    told: Moved = seen[Moved]
    return {(site, head): told.temperature(str(site), head) for site, head in kept}


def margins_of(model: nn.Module, asked: Asked, answers: Sequence[int], edits: Sequence[Edit]) -> Tensor:
    """Return the logit of the positive answer minus that of the negative one, float32 [N]."""
    found = []
    with torch.no_grad(), regard.steer(model, *edits) if edits else nullcontext():
        for inputs in asked.inputs:
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            found.append(logits[:, answers[1]] - logits[:, answers[0]])
    return torch.cat(found).float()


def middle(margins: Tensor, sign: Tensor) -> float:
    """Return the margin midway between the means of the two classes."""
    return float((margins[sign > 0].mean() + margins[sign < 0].mean()) / 2)


def scores(run: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Return treatment -> (1 where right else 0, log-loss in nats once the label bias is gone), per item.

    The three draws of random heads become one treatment, `random`, their mean.
    """
    sign = torch.tensor(run["sign"])
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, some in run["margins"].items():
        margins = torch.tensor(some)
        right = (margins * sign > 0).double()
        loss = torch.nn.functional.softplus(-(margins - run["centre"][name]) * sign).double()
        found[name] = right, loss
    draws = [found.pop(f"random {draw}") for draw in range(DRAWS)]
    found["random"] = tuple(torch.stack(each).mean(0) for each in zip(*draws, strict=True))
    return {name: (right.tolist(), loss.tolist()) for name, (right, loss) in found.items()}


def hidden(model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> list[float]:
    """Return the share of heads with a hidden sink, of each prompt."""
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        told = sink_map(model, {"input_ids": inputs["input_ids"]})
        found.append(float(told.sinks.any(-1).float().mean()))
    return found


def untrained(model: nn.Module) -> nn.Module:
    """Return a copy of fresh random weights."""
    return type(model)(model.config).eval()


def compared(measures: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return every treatment beside the model as it is and beside random heads, as plain values."""
    found = {}
    for kind in ("", "loss_"):
        named = {name: measures[kind + name] for name in TREATED}
        for told in compare_paired(named, measures[f"{kind}plain"], placebo=measures[f"{kind}random"]):
            found[kind + told.name] = {
                "effect": told.effect.value, "low": told.effect.low, "high": told.effect.high, "p": told.p,
                "over_random": told.over_placebo.value if told.over_placebo else None,
                "p_over_random": told.p_over_placebo,
            }  # fmt: skip
    return found
