"""Zero-Resource Hallucination Prevention for Large Language Models (Luo, Xiao, Ma, 2023, arXiv 2309.02654).

How familiar is a concept to a model? It explains the concept, the name is blotted out of the explanation,
and the model is made to find the name back:

    explanation = greedy("Explain the "c" within one short paragraph.")              E tokens at most
    s(c)        = exp 1/n sum_i log p(y_i | masked explanation is related to what?, y_<i)

where y is the best answer of n tokens found by beam search among those that contain a form of c; s is in
(0, 1], the geometric mean of the probabilities of its tokens. The concepts of an instruction are taken
together, the rarest counting most: sum_i 2^-i s_i / sum_i 2^-i, i = 0, 1, ... from the rarest on.

Differs from the official code: the budget counts the longest form and not how many there are; the score is
divided by generated tokens alone; masking respects words (`masking="official"` does not). No sampling, no
other model, no knowledge from outside. Status: agrees with the official code in its pure functions (merging,
rarity, aggregation, masking); the search is ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from regard.errors import RegardError, UnsupportedModel
from regard.lens.familiarity.automaton import Phrases
from regard.lens.familiarity.forms import MODES, blot_out, guess_forms
from regard.lens.familiarity.prompts import EXPLAIN, GUESS, Template
from regard.lens.familiarity.search import Forced, constrained_search
from regard.runtime.progress import bar
from regard.tasks.concepts import by_rarity, find_concepts

BATCH = 8
AGGREGATES = ("weighted", "min", "first")


@dataclass(frozen=True)
class Familiarity:
    """How familiar a concept is.

    Attributes:
        concept: as given.
        score: from 0 to 1.
        explanation: what the model wrote.
        masked: the same with the concept blotted out.
        answer: the best answer that names the concept.
        tokens: of the answer, as text.
        logprobs: of its tokens, natural logarithm.
    """

    concept: str
    score: float
    explanation: str
    masked: str
    answer: str = ""
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class InstructionScore:
    """How familiar the concepts of an instruction are together.

    Attributes:
        instruction: the text.
        score: from 0 to 1; 0 where no concept was found.
        concepts: each with its own score, the rarest first.
    """

    instruction: str
    score: float
    concepts: tuple[Familiarity, ...] = ()

    @property
    def weakest(self) -> Familiarity | None:
        """The concept that is least familiar."""
        return min(self.concepts, key=lambda each: each.score, default=None)


def aggregate(scores: Sequence[float], how: str = "weighted") -> float:
    """Return one score for several concepts, the rarest first; 0 for none.

    Args:
        scores: of the concepts.
        how: "weighted" halves the weight from concept to concept, "min" takes the least, "first" the rarest.

    Example:
        >>> aggregate([0.25, 1.0]), aggregate([0.25, 1.0], "min")
        (0.5, 0.25)
    """
    if how not in AGGREGATES:
        raise RegardError(f"aggregate is {how!r}; it must be one of {', '.join(AGGREGATES)}.")
    if not scores:
        return 0.0
    if how != "weighted":
        return min(scores) if how == "min" else scores[0]
    weights = [2.0**-place for place in range(len(scores))]
    return sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)


@dataclass(eq=False)
class SelfFamiliarity:
    """Ask a causal language model how well it knows concepts, before it answers about them.

    Args:
        model: of transformers, in evaluation mode; encoder-decoders are refused.
        tokenizer: its tokenizer.
        beams: kept by the search, from 2.
        explain_tokens: of an explanation at most.
        guess_tokens: of an answer at most, beyond those of the longest form of the concept.
        template: "chat", "plain" or a function from an instruction to a prompt; default the chat template
            where the tokenizer has one, else plain.
        masking: "words", or "official" for replacement inside words and in the whole prompt.
        aggregate: of several concepts: "weighted" (the paper's), "min" or "first".
        batch_size: how many concepts share a forward.
        progress: show a bar on a terminal.

    Raises:
        RegardError: for an option out of its range.
        UnsupportedModel: for a model that does not write text after a prompt.

    Example:
        >>> known = SelfFamiliarity(model, tokenizer, beams=8, explain_tokens=48)  # doctest: +SKIP
        >>> known.score("Paris").score, known.score("Zorblat").score             # doctest: +SKIP
        (0.31, 0.08)
    """

    model: Any
    tokenizer: Any
    beams: int = 30
    explain_tokens: int = 200
    guess_tokens: int = 15
    template: str | Callable[[str], str] | None = None
    masking: str = "words"
    aggregate: str = "weighted"
    batch_size: int = BATCH
    progress: bool = True
    prompts: Template = field(init=False, repr=False)

    def __post_init__(self) -> None:
        least = {"beams": 2, "explain_tokens": 1, "guess_tokens": 1, "batch_size": 1}
        for name, fewest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < fewest:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from {fewest}.")
        if self.masking not in MODES:
            raise RegardError(f"masking is {self.masking!r}; it must be one of {', '.join(MODES)}.")
        aggregate([], self.aggregate)
        check_writes(self.model)
        if self.tokenizer is None:
            raise UnsupportedModel("concepts are explained in words, so a tokenizer is needed.")
        chat = getattr(self.tokenizer, "chat_template", None)
        self.prompts = Template(self.tokenizer, self.template or ("chat" if chat else "plain"))

    @property
    def settings(self) -> dict[str, Any]:
        """What a score depends on besides the model, as plain values."""
        names = ("beams", "explain_tokens", "guess_tokens", "masking", "aggregate")
        return {**{name: getattr(self, name) for name in names}, "template": self.prompts.name}

    def score(self, concept: str) -> Familiarity:
        """Return how familiar one concept is.

        Raises:
            RegardError: for an empty concept, or one of which no token is left.
        """
        return self.score_all([concept])[0]

    def score_all(self, concepts: Sequence[str]) -> list[Familiarity]:
        """Return how familiar several concepts are, in their order; each is scored once.

        Raises:
            RegardError: for no concepts, and as `score`.
        """
        asked = self.check_concepts(concepts)
        distinct = list(dict.fromkeys(asked))
        found = {each.concept: each for batch in self.in_batches(distinct) for each in batch}
        return [found[concept] for concept in asked]

    def in_batches(self, concepts: Sequence[str]) -> Iterator[list[Familiarity]]:
        """Yield how familiar concepts are, a batch at a time, in their order, with a bar."""
        with bar("Asking for concepts", len(concepts), self.progress) as advance:
            for start in range(0, len(concepts), self.batch_size):
                some = concepts[start : start + self.batch_size]
                yield self.guess_back(some, self.explain(some))
                advance(len(some))

    def score_instruction(self, text: str, concepts: Sequence[str] | None = None) -> InstructionScore:
        """Return how familiar the concepts of an instruction are together.

        Args:
            text: the instruction.
            concepts: what to look at; default what `regard.tasks.concepts.find_concepts` finds. Where there
                is none, the score is 0.
        """
        return self.score_instructions([text], None if concepts is None else [concepts])[0]

    def score_instructions(
        self, texts: Sequence[str], concepts: Sequence[Sequence[str]] | None = None
    ) -> list[InstructionScore]:
        """Return the same for several instructions; a concept that they share is scored once."""
        named = [find_concepts(text) for text in texts] if concepts is None else concepts
        if len(named) != len(texts):
            raise RegardError(f"{len(texts)} instructions came with {len(named)} lists of concepts.")
        ranked = [by_rarity(list(dict.fromkeys(names))) for names in named]
        every = [name for names in ranked for name in names]
        scored = dict(zip(every, self.score_all(every), strict=True)) if every else {}
        return [
            self._together(text, [scored[n] for n in names])
            for text, names in zip(texts, ranked, strict=True)
        ]

    def calibrate(
        self, concepts: Sequence[str] | None = None, unfamiliar: Sequence[str] = (), **options: Any
    ) -> Any:
        """Fit a threshold; see `regard.lens.familiarity.calibrate`, which takes the same."""
        from regard.lens.familiarity.threshold import calibrate

        return calibrate(self, concepts, unfamiliar, **options)

    def guard(self, generate: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Return a gate in front of `generate`; see `regard.lens.familiarity.Gate`, which takes the same."""
        from regard.lens.familiarity.gate import Gate

        return Gate(self, generate=generate, **options)

    def check_concepts(self, concepts: Sequence[str]) -> list[str]:
        """Return concepts without white space around them; refuse what cannot be scored.

        Raises:
            RegardError: for an empty list, an empty concept, or one of which no token is left.
        """
        if isinstance(concepts, str):
            raise RegardError(f"concepts must be a list; for one, give [{concepts!r}].")
        if not len(concepts):
            raise RegardError("the list of concepts is empty; give at least one.")
        found = [str(concept).strip() for concept in concepts]
        for given, concept in zip(concepts, found, strict=True):
            if not concept or not self.phrases_of(concept):
                raise RegardError(f"the concept {given!r} has no letter that the tokenizer knows.")
        return found

    def phrases_of(self, concept: str) -> list[list[int]]:
        """Return the token ids of the forms that an answer must contain one of."""
        ids = (self.tokenizer(form, add_special_tokens=False)["input_ids"] for form in guess_forms(concept))
        special = set(self.tokenizer.all_special_ids)
        return [list(each) for each in ids if each and not special & set(each)]

    @torch.no_grad()
    def explain(self, concepts: Sequence[str]) -> list[str]:
        """Let the model explain concepts, greedily, in one batch."""
        return [
            text.strip().removesuffix("User").strip()
            for text in self.write([EXPLAIN.format(c) for c in concepts])
        ]

    @torch.no_grad()
    def write(self, instructions: Sequence[str], **options: Any) -> list[str]:
        """Let the model answer instructions in one batch, greedily where `options` for generate() do not ask
        for something else.
        """
        ids = [self.prompts.ids(self.prompts.text(instruction)) for instruction in instructions]
        self._check_room(max(map(len, ids)) + self.explain_tokens)
        longest, device = max(map(len, ids)), next(self.model.parameters()).device
        padded = torch.tensor([[self.pad] * (longest - len(x)) + x for x in ids], device=device)
        mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in ids], device=device)
        written = type(self.model).generate(
            self.model,
            input_ids=padded,
            attention_mask=mask,
            pad_token_id=self.pad,
            **{"max_new_tokens": self.explain_tokens, "do_sample": False, "num_beams": 1, **options},
        )
        return list(self.tokenizer.batch_decode(written[:, longest:].tolist(), skip_special_tokens=True))

    def guess_back(
        self, concepts: Sequence[str], explanations: Sequence[str], masked: Sequence[str] | None = None
    ) -> list[Familiarity]:
        """Let the model find concepts back in explanations.

        Args:
            concepts: what has to be found.
            explanations: one each, of the concept or of another one.
            masked: what is shown to the model; default the explanations with their concept blotted out.
        """
        if masked is None:
            pairs = zip(concepts, explanations, strict=True)
            masked = [blot_out(text, concept, self.masking) for concept, text in pairs]
        prompts = [self._back_prompt(*pair) for pair in zip(concepts, masked, strict=True)]
        forced = constrained_search(
            self.model,
            prompts,
            [Phrases(self.phrases_of(concept)) for concept in concepts],
            beams=self.beams,
            extra=self.guess_tokens,
            ends=self.ends,
            pad=self.pad,
        )
        told = zip(concepts, explanations, masked, forced, strict=True)
        return [self._familiarity(*each) for each in told]

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text: the model's own, and the tokenizer's."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        found = [own] if isinstance(own, int) else list(own or ())
        return list(dict.fromkeys([*found, *filter(lambda x: x is not None, [self.tokenizer.eos_token_id])]))

    @property
    def pad(self) -> int:
        """What fills shorter rows; it is masked."""
        own = self.tokenizer.pad_token_id
        return own if own is not None else (self.ends or [0])[0]

    def _together(self, text: str, found: Sequence[Familiarity]) -> InstructionScore:
        return InstructionScore(text, aggregate([each.score for each in found], self.aggregate), tuple(found))

    def _back_prompt(self, concept: str, masked: str) -> list[int]:
        """The prompt that shows a masked explanation, cut where the model takes no more."""
        ids, text = self._back_ids(concept, masked), masked
        room = self._longest - self.guess_tokens - max(map(len, self.phrases_of(concept)))
        while len(ids) > room and text:
            text = text[: max(0, len(text) - int(4 * (len(ids) - room)))]
            ids = self._back_ids(concept, text)
        if text != masked:
            warnings.warn(f"the explanation of {concept!r} was cut to fit the model.", stacklevel=2)
        self._check_room(len(ids))
        return ids

    def _back_ids(self, concept: str, masked: str) -> list[int]:
        prompt = self.prompts.text(GUESS.format(masked))
        return self.prompts.ids(
            blot_out(prompt, concept, "official") if self.masking == "official" else prompt
        )

    @property
    def _longest(self) -> float:
        config = self.model.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) else math.inf

    def _check_room(self, length: int) -> None:
        if length > self._longest:
            raise RegardError(
                f"the model takes {self._longest} tokens, and {length} are needed; "
                "ask for fewer explain_tokens."
            )

    def _familiarity(self, concept: str, explanation: str, masked: str, forced: Forced) -> Familiarity:
        tokens = tuple(str(self.tokenizer.decode([token])) for token in forced.tokens)
        answer = str(self.tokenizer.decode(list(forced.tokens), skip_special_tokens=True))
        score = math.exp(forced.mean) if explanation else 0.0
        return Familiarity(concept, score, explanation, masked, answer, tokens, forced.logprobs)


def check_writes(model: nn.Module) -> None:
    """Refuse a model that does not write text after a prompt.

    Raises:
        UnsupportedModel: naming it.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", lambda: False)():
        raise UnsupportedModel(f"{name} is no causal language model that writes text after a prompt.")
