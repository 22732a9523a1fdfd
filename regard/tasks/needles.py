"""A fact hidden in a long text, and the question that asks for it: does a model find it, and by which heads?

    ... text ... The best thing to eat in Lisbon is a warm custard tart. ... text ...
    Based on the content of the book, Question: What is the best thing to eat in Lisbon?
    Answer: The best thing to eat in Lisbon is        -> a warm custard tart

The whole sentence is the needle; what has to be found again, here `a warm custard tart`, is the *answer*
(the "real needle" of the source), and its place in the prompt is the *span*. Small models answer only where
the sentence of the answer is begun for them (`stem=True`). With a chat template the text stands in <book>
tags and the question in the user's turn.

Source: Wu et al., 2024, arXiv 2404.15574, and its official code for the prompt and the place of the needle
(at the last full stop before the depth asked for). Status: partly our choice (own facts; a prompt has at
most `length` tokens in all, where the official code takes 200 and the needle's own off first).
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.tasks.corpus import novels
from regard.tasks.passages import passages
from regard.tasks.token_spans import find_span, token_offsets

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS, DEPTHS = (256,), (0.2, 0.8)
PLAIN = "{context}\nBased on the content of the book, Question: {question}\nAnswer:"
CHAT = "<book>{context}</book>\nBased on the content of the book, Question: {question}\nAnswer:"
KEYS = ("needle", "question", "real_needle")
CHARACTERS = 12
"""More than a token of English has, so that enough text is taken."""


@dataclass(frozen=True)
class Fact:
    """What is hidden and asked for.

    Attributes:
        needle: the sentence.
        question: asks for it.
        answer: the part of the needle that answers.
        stem: how the answer's sentence begins, or "".
    """

    needle: str
    question: str
    answer: str
    stem: str = ""


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt, and what a model should say.

    Attributes:
        prompt: the text.
        ids: its tokens, int64 [T].
        answer: what should come.
        fact: what it is about: prompts with different facts share no answer.
        span: (first, after the last) token of the answer in the prompt; None where it does not stand there.
        length, depth: as asked for; 0 where that has no meaning.
    """

    prompt: str
    ids: Tensor
    answer: str
    fact: str
    span: tuple[int, int] | None = None
    length: int = 0
    depth: float = 0.0


@dataclass(frozen=True, eq=False)
class Needles(Sequence[Asked]):
    """Prompts of one kind.

    Attributes:
        prompts: in order.
        task: `needle`, or the control that they are.
    """

    prompts: tuple[Asked, ...]
    task: str = "needle"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.prompts)

    @property
    def facts(self) -> tuple[str, ...]:
        """What the prompts are about, each once."""
        return tuple(dict.fromkeys(asked.fact for asked in self))

    def of(self, facts: Iterable[str]) -> Needles:
        """Return the prompts about some facts."""
        chosen = set(facts)
        return replace(self, prompts=tuple(asked for asked in self if asked.fact in chosen))

    def halves(self) -> tuple[Needles, Needles]:
        """Return two sets of prompts that share no fact."""
        return self.of(self.facts[::2]), self.of(self.facts[1::2])


@cache
def _data() -> dict[str, Any]:
    path = resources.files("regard") / "data" / "needles.toml"
    return tomllib.loads(path.read_text("utf-8"))


def packaged_facts() -> list[Fact]:
    """Return the 24 packaged facts, always in the same order.

    Example:
        >>> packaged_facts()[0].needle
        'The best thing to eat in Lisbon is a warm custard tart on the harbour wall.'
    """
    return [
        Fact(f"{told['stem']} {told['answer']}.", told["question"], told["answer"], told["stem"])
        for told in _data()["fact"]
    ]


def known_stems() -> list[tuple[str, str]]:
    """Return (beginning of a sentence, the word that ends it): what models know without being told."""
    return [(told["stem"], told["answer"]) for told in _data()["known"]]


def read_facts(path: str | Path) -> list[Fact]:
    """Read facts from a file with one JSON object a line, as the official code keeps them.

    Args:
        path: each line has `needle`, `question` and `real_needle`, and may have `stem`.

    Raises:
        RegardError: where the file cannot be read, or a line lacks one of these.
    """
    facts = []
    for number, line in enumerate(_lines(path), 1):
        try:
            told = json.loads(line)
            hidden, asked, answer = (str(told[key]) for key in KEYS)
            facts.append(Fact(hidden, asked, answer, str(told.get("stem", ""))))
        except (ValueError, KeyError, TypeError, AttributeError):
            needed = ", ".join(KEYS)
            raise RegardError(f"line {number} of {path} is no JSON object with {needed}.") from None
    if not facts:
        raise RegardError(f"{path} holds no needles.")
    return facts


def _lines(path: str | Path) -> list[str]:
    try:
        return [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RegardError(
            f"{path} cannot be read: {getattr(error, 'strerror', 'it is not UTF-8')}."
        ) from None


def needle(
    tokenizer: Any,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    facts: Sequence[Fact] | None = None,
    haystack: str | None = None,
    seed: int = 0,
    stem: bool = True,
    chat: bool = False,
) -> Needles:
    """Return a prompt for every fact, length and depth.

    Args:
        tokenizer: of transformers.
        lengths: how many tokens a prompt has at most.
        depths: where the needle stands in the text: 0 at its beginning, 1 at its end.
        facts: what is hidden; default the packaged ones.
        haystack: the text; default the packaged passages in an order of `seed`, and beyond them novels.
        seed: of where the text is begun.
        stem: begin the answer, as small models need.
        chat: put the question into the tokenizer's chat template.

    Raises:
        RegardError: for a length that the question alone fills, a text too short for it, a depth out of
            range, a needle that is not found in its prompt, or a tokenizer without a chat template.

    Example:
        >>> needle(tokenizer, lengths=(512,), depths=(0.5,))[0].span            # doctest: +SKIP
        (261, 269)
    """
    facts = packaged_facts() if facts is None else list(facts)
    _check(tokenizer, lengths, depths, facts, chat)
    source = random.Random(seed)
    prompts = []
    for length in lengths:
        for fact in facts:
            text = _text(haystack, length, source)
            for depth in depths:
                prompts.append(_asked(tokenizer, fact, text, length, depth, stem, chat))
    return Needles(tuple(prompts))


def _check(
    tokenizer: Any, lengths: Sequence[int], depths: Sequence[float], facts: list[Fact], chat: bool
) -> None:
    if not list(lengths) or not list(depths) or not facts:
        raise RegardError("a needle test takes a length, a depth and a fact at least.")
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise RegardError(f"a length is {length!r}; it must be a number of tokens.")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise RegardError(f"a depth is {depth}; it must be from 0, the beginning, to 1, the end.")
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise RegardError("the tokenizer has no chat template; leave chat=True out.")


def _text(haystack: str | None, length: int, source: random.Random) -> str:
    """A text of more than `length` tokens, where there is so much."""
    size = CHARACTERS * length
    if haystack is not None:
        begin = source.randrange(max(1, len(haystack) - size))
        sentence = haystack.find(". ", begin) + 2 if begin else 0
        return haystack[sentence:] if len(haystack) - sentence >= size else haystack[-size:]
    some = [passage.text for passage in passages()]
    source.shuffle(some)
    text = "\n".join(some)
    if len(text) < size:
        lines = [line for novel in novels().values() for line in novel.splitlines()]
        begin = source.randrange(len(lines))
        text += "\n" + "\n".join(lines[begin:] + lines[:begin])
    return text[:size]


def _asked(
    tokenizer: Any, fact: Fact, text: str, length: int, depth: float, stem: bool, chat: bool
) -> Asked:  # fmt: skip
    """Put as much of the text around the needle as `length` allows."""

    def written(context: str) -> str:
        return _written(tokenizer, fact, context, stem, chat)

    ends = [end for _, end in token_offsets(tokenizer, text)]
    bare = len(_ids(tokenizer, written(f" {fact.needle} "), chat))
    room = length - bare
    if room < 0:
        raise RegardError(f"a length is {length}; the needle and the question alone take {bare} tokens.")
    if room > len(ends):
        raise RegardError(
            f"the text has {len(ends)} tokens, and a prompt of {length} takes {room} of it; give a longer "
            "text, or a smaller length."
        )
    while True:
        context, place = _with_needle(fact.needle, text[: ends[room - 1] if room else 0], depth)
        prompt = written(context)
        ids = _ids(tokenizer, prompt, chat)
        if len(ids) <= length or not room:
            break
        room = max(0, room - (len(ids) - length))
    return _found(tokenizer, fact, prompt, prompt.index(context) + place, chat, length, depth)


def _with_needle(needle: str, text: str, depth: float) -> tuple[str, int]:
    """Return the text with a needle after the last full stop before `depth`, and where the needle begins."""
    cut = round(depth * len(text))
    if depth < 1:
        stop = text.rfind(".", 0, cut)
        cut = stop + 1 if stop >= 0 else 0
    before, after = text[:cut].rstrip(), text[cut:].lstrip()
    begin = f"{before} " if before else ""
    return f"{begin}{needle.strip()} {after}".rstrip(), len(begin)


def _written(tokenizer: Any, fact: Fact, context: str, stem: bool, chat: bool) -> str:
    begun = f" {fact.stem}" if stem and fact.stem else ""
    if not chat:
        return PLAIN.format(context=context, question=fact.question) + begun
    said = [{"role": "user", "content": CHAT.format(context=context, question=fact.question)}]
    prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return str(prompt) + begun.lstrip()


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    return list(tokenizer(prompt, add_special_tokens=not chat)["input_ids"])


def _found(
    tokenizer: Any, fact: Fact, prompt: str, begin: int, chat: bool, length: int, depth: float
) -> Asked:  # fmt: skip
    """Return the prompt with the answer's place in it.

    Raises:
        RegardError: naming the needle, where the answer is not found.
    """
    import torch

    within = fact.needle.find(fact.answer)
    place = None if within < 0 else (begin + within, begin + within + len(fact.answer))
    ids = _ids(tokenizer, prompt, chat)
    span = find_span(tokenizer, prompt, fact.answer, place, ids, special=not chat)
    if span is None:
        raise RegardError(
            f"the answer {fact.answer!r} of the needle {fact.needle!r} is not found in its prompt."
        )
    return Asked(prompt, torch.tensor(ids), fact.answer, fact.question, span, length, depth)
