"""Beam search for the likeliest continuation that says one of several phrases.

    score = 1/n sum over the n generated tokens of log p(token | prompt, tokens before)

A beam may end only after it has said a phrase, and every beam always has room left to say one. The beams
kept are the best of three banks in turn, those that have said one, are saying one, have said nothing of one,
so that a likely text without the phrase cannot crowd out the others. transformers 5 no longer has such a
search: `force_words_ids` asks for remote code.

Source: the constraint of Luo, Xiao and Ma, 2023, arXiv 2309.02654, and its official code; banks after Post
and Vilar, 2018, arXiv 1804.06609. Status: partly our choice (the score is divided by the tokens generated,
as transformers does today and older releases did not; the budget counts the longest phrase).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel
from regard.lens.familiarity.automaton import SAID, START, Phrases


@dataclass(frozen=True)
class Forced:
    """A continuation that says one of the phrases.

    Attributes:
        tokens: its ids, with the end token where it ended itself.
        logprobs: log-probability of each, natural logarithm.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean log-probability of a token."""
        return sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    state: int = START
    row: int = 0


class _Hunt:
    """The search for one prompt: its beams, and the best continuation that has ended."""

    def __init__(self, phrases: Phrases, beams: int, extra: int, ends: frozenset[int], row: int) -> None:
        self.phrases, self.width, self.ends = phrases, beams, ends
        self.most = phrases.longest + extra
        self.beams = [_Beam(row=row)]
        self.best: Forced | None = None

    def extend(self, logprobs: Tensor, tops: Sequence[Sequence[int]]) -> None:
        """Go one token on.

        Args:
            logprobs: float32 [beams, V].
            tops: for each beam, likely tokens.
        """
        steps = [
            (beam, place, token)
            for place, beam in enumerate(self.beams)
            for token in self._tokens(beam, tops[place])
        ]
        rows, columns = [place for _, place, _ in steps], [token for *_, token in steps]
        values = logprobs[rows, columns].tolist()
        banks: tuple[list[_Beam], list[_Beam], list[_Beam]] = ([], [], [])
        for (beam, _, token), value in zip(steps, values, strict=True):
            self._take(beam, token, value, banks)
        self.beams = list(_in_turn(banks, self.width))

    @property
    def over(self) -> bool:
        """Whether nothing better can still be found: what follows at most adds tokens of probability 1."""
        if not self.beams:
            return True
        hope = max(beam.total for beam in self.beams) / self.most
        return self.best is not None and self.best.mean >= hope

    def _tokens(self, beam: _Beam, top: Sequence[int]) -> set[int]:
        if beam.state == SAID:
            return {*top, *self.ends}
        return ({*top} | self.phrases.onward(beam.state)) - self.ends

    def _take(self, beam: _Beam, token: int, value: float, banks: tuple[list[_Beam], ...]) -> None:
        state = self.phrases.after(beam.state, token)
        tokens, room = (*beam.tokens, token), self.most - len(beam.tokens) - 1
        if state != SAID and self.phrases.left[state] > room:
            return
        found = _Beam(tokens, (*beam.logprobs, value), beam.total + value, state, beam.row)
        if token in self.ends or not room:
            forced = Forced(found.tokens, found.logprobs)
            if self.best is None or forced.mean > self.best.mean:
                self.best = forced
        else:
            banks[0 if state == SAID else 1 if state != START else 2].append(found)


def _in_turn(banks: Sequence[list[_Beam]], width: int) -> Iterator[_Beam]:
    """Yield the best of each bank, then the second best of each, and so on, `width` in all."""
    ranked = [sorted(bank, key=lambda beam: -beam.total) for bank in banks]
    taken = 0
    for place in range(max(map(len, ranked))):
        for bank in ranked:
            if place < len(bank) and taken < width:
                taken += 1
                yield bank[place]


@torch.no_grad()
def constrained_search(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    phrases: Sequence[Phrases],
    *,
    beams: int = 30,
    extra: int = 15,
    ends: Sequence[int] = (),
    pad: int = 0,
) -> list[Forced]:
    """Return the best continuation found for each prompt; all prompts run in one batch.

    Args:
        model: a causal language model of transformers, in evaluation mode. The prompts run once; their keys
            and values are copied for the beams.
        prompts: token ids of each.
        phrases: for each prompt, those of which one must be said.
        beams: how many are kept, from 1.
        extra: tokens beyond those of the longest phrase, at most, the end token included.
        ends: tokens that end a text.
        pad: token put before shorter prompts; it is masked.

    Raises:
        RegardError: for no beams, an empty prompt, or phrases that contain an end token.
        UnsupportedModel: for a model without a cache whose rows can be reordered.

    Example:
        >>> phrases = Phrases([tokenizer(" Paris")["input_ids"]])          # doctest: +SKIP
        >>> constrained_search(model, [prompt], [phrases], beams=8)[0].mean # doctest: +SKIP
        -1.93
    """
    if beams < 1 or extra < 0:
        raise RegardError(f"beams is {beams} and extra {extra}; they must be at least 1 and 0.")
    if not prompts or not all(prompts) or len(prompts) != len(phrases):
        raise RegardError("every prompt needs tokens, and phrases of its own.")
    stops = frozenset(ends)
    hunts = [_Hunt(each, beams, extra, stops, row) for row, each in enumerate(phrases)]
    runner = _Runner(model, prompts, pad)
    logits = runner.start()
    while True:
        alive = [hunt for hunt in hunts if not hunt.over]
        if not alive:
            return [_found(hunt) for hunt in hunts]
        logprobs = torch.log_softmax(logits.float(), -1)
        tops = logprobs.topk(min(2 * beams, logprobs.shape[1]), -1).indices.tolist()
        at = 0
        for hunt in alive:
            count = len(hunt.beams)
            sources = range(at, at + count)
            hunt.beams = [_at(beam, row) for beam, row in zip(hunt.beams, sources, strict=True)]
            hunt.extend(logprobs[at : at + count], tops[at : at + count])
            at += count
        kept = [beam for hunt in alive if not hunt.over for beam in hunt.beams]
        if kept:
            logits = runner.go_on([beam.row for beam in kept], [beam.tokens[-1] for beam in kept])


def _at(beam: _Beam, row: int) -> _Beam:
    return _Beam(beam.tokens, beam.logprobs, beam.total, beam.state, row)


def _found(hunt: _Hunt) -> Forced:
    if hunt.best is None:
        raise RegardError("no continuation can say the phrase; it contains a token that ends a text.")
    return hunt.best


class _Runner:
    """A model that reads prompts once, then token after token for rows that come and go."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad: int) -> None:
        self.model = model
        known = inspect.signature(model.forward).parameters
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.placed = "position_ids" in known
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        self.ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache: Any = None

    def start(self) -> Tensor:
        """Return the logits [N, V] after the prompts."""
        return self._run(self.ids)

    def go_on(self, rows: list[int], tokens: list[int]) -> Tensor:
        """Return the logits [R, V] after one more token each, of rows picked from those before."""
        if rows != list(range(len(self.mask))):
            index = torch.tensor(rows, device=self.mask.device)
            self.mask = self.mask[index]
            self.cache.reorder_cache(index)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(rows), 1)], 1)
        return self._run(torch.tensor(tokens, device=self.mask.device)[:, None])

    def _run(self, ids: Tensor) -> Tensor:
        places = {}
        if self.placed:
            places = {"position_ids": (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        out = self.model(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True,
            **places, **self.last,
        )  # fmt: skip
        self.cache = getattr(out, "past_key_values", None)
        if not hasattr(self.cache, "reorder_cache"):
            raise UnsupportedModel(
                f"{type(self.model).__name__} returns no cache of keys and values that beams could share."
            )
        return out.logits[:, -1]
