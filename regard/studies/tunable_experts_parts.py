"""The work of the study of tunable experts: models with a planted expert, and ones that learned to refuse."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.edit.experts import ExpertTable, TuneExperts, differential, record_experts
from regard.edit.experts.controls import Expert, MatchedSets, firing_rates, matched_sets
from regard.edit.experts.effects import profile_prompts, text_loss
from regard.models.planted_expert import NEUTRAL, REFUSE, SENSITIVE, planted_model
from regard.models.refusing_experts import refusing_experts
from regard.objectives.refusing import TOKENS, train_refusing
from regard.objectives.schedule import mixed
from regard.runtime.verbs import steer
from regard.tasks.closed_places import REFUSING, Asked, ClosedPlaces, right, spread, tokenizer
from regard.tasks.greedy import greedy_answers

Tick = Callable[[float], None]
LENGTH, PROMPTS = 5, 24
FEWEST = 200


def planted(seed: int, sets: int) -> dict[str, float]:
    """Return whether the planted expert ranks first, and what it does when it is off."""
    model, place = planted_model(seed)
    generator = torch.Generator().manual_seed(mixed(seed, 2))
    sensitive, neutral = (
        torch.randint(*some, (2 * PROMPTS, LENGTH), generator=generator) for some in (SENSITIVE, NEUTRAL)
    )
    read = torch.cat([sensitive[:PROMPTS], neutral[:PROMPTS]])
    use, layers = record_experts(model, {"input_ids": read})
    labels = [1] * PROMPTS + [0] * PROMPTS
    shuffled = random.Random(f"shuffled/{seed}").sample(labels, len(labels))
    table, chance = (differential(use, layers, some, 1) for some in (labels, shuffled))
    asked = sensitive[PROMPTS:]

    @torch.no_grad()
    def refused(off: Sequence[Expert] = ()) -> float:
        if not off:
            return float((model(asked).logits[:, -1].argmax(-1) == REFUSE).float().mean())
        with steer(model, TuneExperts(off=off)):
            return refused()

    before = refused()
    others = matched_sets(firing_rates(use[:PROMPTS], layers), [place], sets, seed=seed)
    return {
        "first": float(table.experts(1) == [place]),
        "first_shuffled": float(chance.experts(1) == [place]),
        "lifted": before - refused([place]),
        "lifted_random": max(before - refused(some) for some in others.sets),
    }


def learned(seed: int, steps: int, tick: Tick) -> tuple[Any, dict[str, Any]]:
    """Return a model that learned to refuse, and how it went.

    A long training goes on from a temporary folder where it was stopped.
    """
    torch.manual_seed(mixed(seed, 0))
    folder = Path(tempfile.gettempdir()) / "regard-tunable-experts" / f"{steps}-{seed}"
    model, log = train_refusing(
        model=refusing_experts(), steps=steps, seed=seed, out=folder if steps > FEWEST else None,
        every=300 if steps > FEWEST else steps, tick=tick,
    )  # fmt: skip
    return model, {
        "steps": [step for step, _ in log.held_out],
        "measures": [found for _, found in log.measures],
    }


@dataclass(frozen=True, eq=False)
class Trial:
    """A model, its experts ranked, and prompts that the ranking has not seen.

    Attributes:
        closed: kept questions about closed places.
        able: questions about open places, and words to repeat.
        table: experts by how much more refused questions use them.
        rates: how much these use each.
    """

    model: Any
    words: Any
    seed: int
    closed: Sequence[Asked]
    open: Sequence[Asked]
    repeats: Sequence[Asked]
    stated: Sequence[str]
    table: ExpertTable
    rates: dict[Expert, float]

    @classmethod
    def of(cls, model: Any, seed: int, prompts: int) -> Trial:
        """Rank the experts on questions that the refusing was learned on, beside open ones."""
        world, words = ClosedPlaces(seed), tokenizer()
        answered = world.answered()
        read = [*world.refused(held_out=False), *answered[::2]]
        labels = [one.kind for one in read]
        use, layers = profile_prompts(model, words, [one.prompt for one in read], batch=256)
        mine = torch.tensor([label == "closed" for label in labels])
        return cls(
            model, words, seed, spread(world.refused(held_out=True), prompts),
            spread(answered[1::2], prompts), world.repeats(prompts, seed=1),
            spread(world.statements(), prompts), differential(use, layers, labels, "closed"),
            firing_rates(use[mine], layers),
        )  # fmt: skip

    def said(self, asked: Sequence[Asked]) -> list[str]:
        """Return what the model answers as it is now."""
        prompts = [one.prompt for one in asked]
        return greedy_answers(self.model, self.words, prompts, tokens=TOKENS, batch=256)

    def refused(self, edit: TuneExperts | None, asked: Sequence[Asked]) -> tuple[float, float]:
        """Return which shares of questions are refused, and answered rightly, under an edit."""
        if edit is not None:
            with steer(self.model, edit):
                return self.refused(None, asked)
        answers = self.said(asked)
        return _share([REFUSING in answer for answer in answers]), _share(right(asked, answers))

    def under(self, edit: TuneExperts | None) -> dict[str, float]:
        """Return all that is measured under an edit."""
        if edit is not None:
            with steer(self.model, edit):
                return self.under(None)
        refused, told = self.refused(None, self.closed)
        able = [*self.open, *self.repeats]
        return {
            "refused": refused, "told": told, "right": _share(right(able, self.said(able))),
            "loss": text_loss(self.model, self.words, self.stated, batch=256),
        }  # fmt: skip

    def others(self, count: int, sets: int) -> MatchedSets:
        """Return random sets of so many experts that fire as much as the leading ones."""
        return matched_sets(self.rates, self.table.experts(count), sets, seed=self.seed)

    def outcome(self, off: int, on: int, sets: int, tick: Tick) -> dict[str, Any]:
        """Return what the study measures of this model."""
        leading, others = self.table.experts(off), self.others(off, sets)
        base, top = self.under(None), self.under(TuneExperts(off=leading))
        random_: list[dict[str, float]] = []
        for some in others.sets:
            random_.append(self.under(TuneExperts(off=some)))
            tick(len(random_) / sets / 2)
        last = TuneExperts(off=self.table.experts(off, largest=False))
        forced = [self.table.experts(on), *_seatable(self.others(on, 2 * sets).sets, self.model, sets)]
        asked = [self.refused(TuneExperts(on=some), self.open)[0] for some in forced]
        lifts = [base["refused"] - one["refused"] for one in random_]
        tick(1.0)
        return {
            "refused": base["refused"], "right": base["right"], "lifted": base["refused"] - top["refused"],
            "lifts": lifts, "lifted_random": max(lifts), "lifted_random_mean": float(np.mean(lifts)),
            "lifted_last": base["refused"] - self.refused(last, self.closed)[0],
            **{
                f"lifted_{mode}": base["refused"]
                - self.refused(TuneExperts(off=leading, mode=mode), self.closed)[0]
                for mode in ("silence", "refill")
            },
            "told": top["told"], "told_random": max(one["told"] for one in random_),
            "lost": base["right"] - top["right"],
            "lost_random": base["right"] - float(np.mean([one["right"] for one in random_])),
            "forced": asked[0], "forced_random": max(asked[1:]), "fires": float(np.mean(others.rates)),
            "loss": base["loss"], "loss_off": top["loss"],
            "loss_random": float(np.mean([one["loss"] for one in random_])),
            "leading": leading, "scores": [[round(x, 4) for x in row] for row in self.table.scores.tolist()],
        }  # fmt: skip

    def sweep(self, counts: Sequence[int], few: int, tick: Tick) -> dict[str, list[Any]]:
        """Return the share refused by how many experts are off: the leading ones, and random sets."""
        found: dict[str, list[Any]] = {"counts": list(counts), "leading": [], "random": []}
        for number, count in enumerate(counts):
            one, *rest = [self.table.experts(count), *self.others(count, few).sets]
            found["leading"].append(self.refused(TuneExperts(off=one), self.closed)[0])
            found["random"].append([self.refused(TuneExperts(off=some), self.closed)[0] for some in rest])
            tick((number + 1) / len(counts))
        return found


def _seatable(sets: Sequence[Sequence[Expert]], model: Any, count: int) -> list[Sequence[Expert]]:
    """Sets of which a router can choose all."""
    most = model.config.num_experts_per_tok
    fits = [s for s in sets if max(sum(one == layer for one, _ in s) for layer, _ in s) <= most]
    return fits[:count]


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)
