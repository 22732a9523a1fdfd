"""What turning experts off, on or down does to a behaviour: rates of answers that show it, with intervals.

    rate = answers that show the behaviour / prompts, with Wilson's 95 % interval
    loss = mean next-token loss of plain texts, in nats a token

Answers are greedy. Source: the question is that of Dahlke et al., 2025, arXiv 2502.11096, section 4; the
interval Wilson's (1927), by scipy. Status: our choice (controls, loss).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from regard.edit.experts.recording import Value, record_experts
from regard.edit.experts.steering import TuneExperts
from regard.errors import RegardError
from regard.runtime.table import Table
from regard.runtime.verbs import steer
from regard.tasks.greedy import greedy_answers, padded_prompts

REFUSALS = r"\b(cannot|can't|can not|won't|will not|unable|not able|sorry)\b"
BATCH = 32


@dataclass(frozen=True)
class Rate:
    """So many of so many, with Wilson's 95 % interval.

    Example:
        >>> rate = Rate.of([True, False, True, True])
        >>> rate.share, round(rate.low, 2), round(rate.high, 2)
        (0.75, 0.3, 0.95)
    """

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, shown: Sequence[bool]) -> Rate:
        """Count, and find the interval.

        Raises:
            RegardError: for nothing to count, or where scipy is missing.
        """
        if not shown:
            raise RegardError("there are no answers to count.")
        try:
            from scipy.stats import binomtest
        except ImportError:
            raise RegardError('intervals need scipy: pip install "regard[study]".') from None
        count = sum(map(bool, shown))
        found = binomtest(count, len(shown)).proportion_ci(method="wilson")
        return cls(count, len(shown), float(found.low), float(found.high))

    @property
    def share(self) -> float:
        """Count over total."""
        return self.count / self.total

    def __str__(self) -> str:
        return f"{self.share:.0%} ({self.low:.0%}-{self.high:.0%})"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a model does under one edit, or none.

    Attributes:
        name: of the condition.
        edit: what was done; None for nothing.
        behaviour, others: rates of the behaviour on the two sets of prompts.
        loss: of plain texts, in nats a token; None where there were none.
        answers: to the prompts of the behaviour, then to the others.
    """

    name: str
    edit: TuneExperts | None
    behaviour: Rate
    others: Rate
    loss: float | None
    answers: tuple[Sequence[str], Sequence[str]] = field(repr=False)


def shows(pattern: str = REFUSALS) -> Callable[[str], bool]:
    """Return the rule by which an answer shows a behaviour: a regular expression is found in it.

    Raises:
        RegardError: for what is no regular expression.

    Example:
        >>> shows()("I cannot speak of that.")
        True
    """
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RegardError(f"{pattern!r} is no regular expression: {error}.") from None
    return lambda answer: compiled.search(answer) is not None


def measure_effects(
    model: Any,
    tokenizer: Any,
    behaviour: Sequence[str],
    others: Sequence[str],
    edits: Mapping[str, TuneExperts | None],
    *,
    rule: Callable[[str], bool] | None = None,
    neutral: Sequence[str] = (),
    tokens: int = 24,
    chat: bool = False,
    batch: int = BATCH,
    tick: Callable[[int], None] | None = None,
) -> list[Effect]:
    """Return what a model does under each of several edits.

    Args:
        model, tokenizer: of transformers.
        behaviour: prompts that are to show it.
        others: prompts that are not.
        edits: name -> edit, or None for the model as it is.
        rule: whether an answer shows it; default common words of refusal, `REFUSALS`.
        neutral: plain texts whose loss is measured too.
        tokens: of an answer, at most.
        chat: whether prompts go through the tokenizer's chat template.
        batch: prompts at once.
        tick: told how many prompts were answered, after each batch.

    Raises:
        UnsupportedModel: for a model without routers.
        NoSuchSite: for an expert that is not there.
        RegardError: for no prompts.
    """
    rule = rule or shows()
    for edit in edits.values():
        if edit is not None:
            steer(model, edit)
    found = []
    for name, edit in edits.items():
        with nullcontext() if edit is None else steer(model, edit):
            said = [
                greedy_answers(model, tokenizer, some, tokens=tokens, batch=batch, chat=chat, tick=tick)
                for some in (behaviour, others)
            ]
            loss = text_loss(model, tokenizer, neutral, batch=batch) if neutral else None
        rates = [Rate.of([rule(answer) for answer in answers]) for answers in said]
        effect = Effect(
            name=name, edit=edit, behaviour=rates[0], others=rates[1], loss=loss, answers=(said[0], said[1])
        )
        found.append(effect)
    return found


def effects_table(effects: Sequence[Effect]) -> Table:
    """Return one row a condition."""
    return Table(
        {
            "experts": [effect.name for effect in effects],
            **{
                f"{which} {part}": [getattr(getattr(effect, which), part) for effect in effects]
                for which in ("behaviour", "others")
                for part in ("share", "low", "high")
            },
            "loss": [effect.loss for effect in effects],
        }
    )


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = BATCH) -> float:
    """Return the mean next-token loss of texts, in nats a token."""
    total, count = 0.0, 0
    for at in range(0, len(texts), batch):
        fed = padded_prompts(tokenizer, texts[at : at + batch]).to(model.device)
        logits = model(**fed).logits[:, :-1].float()
        there = (fed["attention_mask"][:, 1:] * fed["attention_mask"][:, :-1]).bool()
        total += float(F.cross_entropy(logits[there], fed["input_ids"][:, 1:][there], reduction="sum"))
        count += int(there.sum())
    if not count:
        raise RegardError("the plain texts have no two tokens in a row.")
    return total / count


def profile_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    value: Value = "weight",
    last: bool = False,
    chat: bool = False,
    batch: int = BATCH,
    tick: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Return how much each prompt uses each expert, as `record_experts` does, of texts.

    Args:
        value: as for `record_experts`.
        last: only the last token counts; default all, as in the paper. Special tokens count, as all prompts
            have them.
        chat, batch, tick: as for `measure_effects`.

    Returns:
        Use, float32 [N, L, E], and the numbers of the L layers.

    Raises:
        UnsupportedModel: for a model without routers.
        RegardError: for no prompts.
    """
    parts: list[torch.Tensor] = []
    layers: list[int] = []
    for at in range(0, max(len(prompts), 1), batch):
        fed = padded_prompts(tokenizer, prompts[at : at + batch], chat=chat).to(model.device)
        ids = fed["input_ids"]
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[:, -1 if last else slice(None)] = True
        part, layers = record_experts(model, fed, value=value, positions=counted)
        parts.append(part)
        if tick is not None:
            tick(len(ids))
    return torch.cat(parts), layers
