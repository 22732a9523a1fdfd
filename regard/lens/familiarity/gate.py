"""A gate in front of `generate()`: what the model does not know well enough is withheld, and it says why.

    answer iff score(instruction) > threshold

Source: Luo, Xiao and Ma, 2023, arXiv 2309.02654. Status: partly our choice (the words of a withheld answer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.lens.familiarity.scoring import InstructionScore, SelfFamiliarity
from regard.lens.familiarity.threshold import Threshold

UNNAMED = ("withhold", "answer")


@dataclass(frozen=True)
class Decision:
    """Whether an instruction was answered, and why.

    Attributes:
        answered: whether it was.
        reason: in one sentence.
        score: of the instruction, with its concepts.
        threshold: what it had to be above.
    """

    answered: bool
    reason: str
    score: InstructionScore
    threshold: float


@dataclass
class Sequences:
    """What a gate returns in place of a dict where nothing was generated.

    Attributes:
        sequences: int64 [B, T].
    """

    sequences: Tensor


class Gate:
    """Call it as `model.generate`, or enter it, so that `model.generate` is it until it is left.

    A withheld row comes back as the prompt and the sentence that says why, in tokens, so that decoding,
    batches, pipelines and streamers go on as they are. Only rows that are answered are generated.

    Args:
        known: scores the instructions.
        threshold: a fitted one, which must be of the same model and settings, or a number from 0 to 1.
        generate: what to call; default the model's own.
        unnamed: what to do with an instruction that names no concept, "withhold" as the paper or "answer".
        words: from a decision to the text that stands in place of a withheld answer.
        concepts: from an instruction to its concepts; default `regard.tasks.concepts.find_concepts`.

    Attributes:
        decisions: of the last call, one a row.

    Raises:
        RegardError: for a threshold of another model or settings, or out of its range.

    Example:
        >>> gate = known.guard(model.generate, threshold=0.2)               # doctest: +SKIP
        >>> out = gate(**inputs, max_new_tokens=40)                         # doctest: +SKIP
        >>> gate.decisions[0].reason                                        # doctest: +SKIP
        'withheld: familiarity 0.05 is not above 0.2; least familiar is "Zorblat" (0.05)'
    """

    def __init__(
        self,
        known: SelfFamiliarity,
        threshold: Threshold | float,
        generate: Callable[..., Any] | None = None,
        *,
        unnamed: str = "withhold",
        words: Callable[[Decision], str] | None = None,
        concepts: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        if unnamed not in UNNAMED:
            raise RegardError(f"unnamed is {unnamed!r}; it must be one of {', '.join(UNNAMED)}.")
        if isinstance(threshold, Threshold):
            threshold.check(known)
            threshold = threshold.value
        if isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise RegardError(f"the threshold is {threshold!r}; a score is from 0 to 1, and so must it be.")
        self.known, self.threshold, self.unnamed = known, float(threshold), unnamed
        self.words, self.concepts = words or refusal, concepts
        self.generate: Callable[..., Any] = generate or known.model.generate
        self.decisions: list[Decision] = []

    def decide(self, instructions: Sequence[str]) -> list[Decision]:
        """Return for each instruction whether it may be answered."""
        named = None if self.concepts is None else [list(self.concepts(text)) for text in instructions]
        return [self.judge(score) for score in self.known.score_instructions(instructions, named)]

    def __call__(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """Generate as `model.generate` does; see the class.

        Args:
            inputs: token ids [B, T], padded on the left where rows differ, or `input_ids=`.
            options: for `generate`. With `return_dict_in_generate` everything but `sequences` is of the
                answered rows alone, in their order; where there is none, only `sequences` are returned.

        Raises:
            RegardError: where there are no token ids, or a cache or a streamer that cannot be parted by row.
        """
        ids = options.pop("input_ids", None) if inputs is None else inputs
        self._check(ids, options)
        assert isinstance(ids, Tensor)
        mask = options.get("attention_mask")
        mask = self._mask(ids) if mask is None else mask
        rows = [[int(t) for t in row[kept.bool()]] for row, kept in zip(ids, mask, strict=True)]
        self.decisions = self.decide([self.known.prompts.instruction_of(row) for row in rows])
        answered = [place for place, decision in enumerate(self.decisions) if decision.answered]
        if len(answered) == len(rows):
            return self.generate(input_ids=ids, **options)
        if not answered and options.get("streamer") is not None:
            self._stream(options["streamer"], ids)
        out = self._generate(ids, answered, options) if answered else None
        return self._merge(ids, answered, out, options)

    def __enter__(self) -> Gate:
        model = self.known.model
        if isinstance(vars(model).get("generate"), Gate):
            raise RegardError("a gate stands in front of this model already.")
        self._before = vars(model).get("generate")
        model.generate = self
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            del self.known.model.generate
        else:
            self.known.model.generate = self._before

    def judge(self, score: InstructionScore) -> Decision:
        """Return whether an instruction that has been scored may be answered."""
        weakest = score.weakest
        if weakest is None:
            answered = self.unnamed == "answer"
            why = "no concept was found in the instruction"
        else:
            answered = score.score > self.threshold
            sign = "above" if answered else "not above"
            why = f"familiarity {score.score:.3g} is {sign} {self.threshold:.3g}"
            why += f'; least familiar is "{weakest.concept}" ({weakest.score:.3g})'
        return Decision(answered, f"{'answered' if answered else 'withheld'}: {why}", score, self.threshold)

    def _check(self, ids: Any, options: dict[str, Any]) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not len(ids):
            raise RegardError("the gate reads instructions from token ids [B, T]; give input_ids.")
        if options.get("inputs_embeds") is not None:
            raise RegardError("the gate reads instructions from token ids; leave inputs_embeds out.")
        if len(ids) > 1 and options.get("past_key_values") is not None:
            raise RegardError("a cache of several rows cannot be parted; leave past_key_values out.")

    def _mask(self, ids: Tensor) -> Tensor:
        """What is no padding on the left."""
        pad = self.known.tokenizer.pad_token_id
        if pad is None or len(ids) == 1:
            return torch.ones_like(ids)
        return (ids != pad).long().cummax(1).values

    def _generate(self, ids: Tensor, answered: list[int], options: dict[str, Any]) -> Any:
        """Generate the rows that are answered, with whatever else came a row each."""
        index = torch.tensor(answered, device=ids.device)
        own = {
            name: value[index.to(value.device)]
            if isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(ids)
            else value
            for name, value in options.items()
        }
        return self.generate(input_ids=ids[index], **own)

    def _merge(self, ids: Tensor, answered: list[int], out: Any, options: dict[str, Any]) -> Any:
        """Put withheld rows where they were asked for."""
        made = None if out is None else out if isinstance(out, Tensor) else out.sequences
        each = self._returned(options) if made is None else len(made) // len(answered)
        rows: list[Tensor] = []
        for place, decision in enumerate(self.decisions):
            if decision.answered and made is not None:
                at = answered.index(place) * each
                rows += list(made[at : at + each])
            else:
                rows += [torch.cat([ids[place], self._told(decision).to(ids.device)])] * each
        longest = max(map(len, rows))
        merged = torch.stack([_filled(row, longest, self.known.pad) for row in rows])
        if isinstance(out, Tensor):
            return merged
        if out is not None:
            out.sequences = merged
            return out
        return Sequences(merged) if self._option("return_dict_in_generate", options) else merged

    def _returned(self, options: dict[str, Any]) -> int:
        return int(self._option("num_return_sequences", options) or 1)

    def _option(self, name: str, options: dict[str, Any]) -> Any:
        given = options.get("generation_config") or getattr(self.known.model, "generation_config", None)
        return options.get(name, getattr(given, name, None))

    def _told(self, decision: Decision) -> Tensor:
        """The words of a withheld answer and the end of text, as tokens [T]."""
        ids = self.known.tokenizer(self.words(decision), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, *self.known.ends[:1]], dtype=torch.long)

    def _stream(self, streamer: Any, ids: Tensor) -> None:
        """Hand a streamer the prompt and then token after token, as `generate` does."""
        streamer.put(ids.cpu())
        for token in self._told(self.decisions[0]):
            streamer.put(token[None])
        streamer.end()


def refusal(decision: Decision) -> str:
    """Return what stands in place of a withheld answer."""
    weakest = decision.score.weakest
    if weakest is None:
        return "I cannot tell what this is about, so I would rather not answer."
    return (
        f'I do not know "{weakest.concept}" well enough to answer '
        f"(familiarity {decision.score.score:.3g}, asked for more than {decision.threshold:.3g})."
    )


def _filled(row: Tensor, length: int, pad: int) -> Tensor:
    return torch.cat([row, row.new_full((length - len(row),), pad)])
