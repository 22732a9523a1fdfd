"""Multiple-choice questions of one's own, under any labels: A to D, other letters, numbers, shuffled.

    A highly knowledgeable and intelligent AI answers multiple-choice questions about animals.

    Question: Which of these is an animal?
    (A) table
    (B) horse
    (C) green
    (D) London
    Answer: (                                          -> B

What the labels stand for can so be told from the letters themselves: a model that finds the n-th item of a
list does as well with other letters. A label must be one token where it stands as the answer.

Source: the form is that of Lieberum et al., 2023, arXiv 2307.09458, from memory (theirs are questions of
MMLU). Status: partly our choice.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.tasks.multiple_choice import KINDS
from regard.tasks.prompts import _place, check_count

if TYPE_CHECKING:
    from torch import Tensor

PREAMBLE = "A highly knowledgeable and intelligent AI answers multiple-choice questions{about}.\n\n"
LABELS = ("ABCD", "next", "random", "1234", "shuffled")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: the question itself.
        options: what may be the answer.
        right: which is, counted from 0.
        topic: what it is about, or "".
    """

    text: str
    options: tuple[str, ...]
    right: int
    topic: str = ""


@dataclass(frozen=True)
class Style:
    """How a question is written.

    Attributes:
        before, after: what stands around a label in the list; `before` also ends the prompt.
        preamble: whether the sentence about the AI stands first.
    """

    before: str = "("
    after: str = ") "
    preamble: bool = True


@dataclass(frozen=True, eq=False)
class Choices:
    """Questions as prompts.

    Attributes:
        questions: what was asked.
        texts: the prompts, which end before the label.
        ids: their tokens, int64 [T] each.
        labels: the labels of each, in the order of its options.
        label_ids: what must follow for each of them, int64 [N, options].
        right: which is right, int64 [N].
        label_places, option_places: positions of the labels, and of the last token of each option, in the
            last question of the prompt, int64 [N, options].
    """

    questions: tuple[Question, ...]
    texts: tuple[str, ...]
    ids: tuple[Tensor, ...]
    labels: tuple[tuple[str, ...], ...]
    label_ids: Tensor
    right: Tensor
    label_places: Tensor
    option_places: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def ends(self) -> Tensor:
        """Position of the last token of each, int64 [N]."""
        import torch

        return torch.tensor([len(ids) - 1 for ids in self.ids])

    def by_length(self) -> list[list[int]]:
        """Return which prompts are of one length, the largest group first."""
        groups: dict[int, list[int]] = {}
        for number, ids in enumerate(self.ids):
            groups.setdefault(len(ids), []).append(number)
        return sorted(groups.values(), key=len, reverse=True)

    def others(self) -> list[int]:
        """Return for each prompt the next one with another right place, to corrupt it with.

        Raises:
            RegardError: where all have the same.
        """
        right = self.right.tolist()
        if len(set(right)) < 2:
            raise RegardError(
                "all questions have their right option at the same place, so none can corrupt another."
            )
        count = len(right)
        return [
            next(j % count for j in range(i + 1, i + count) if right[j % count] != right[i])
            for i in range(count)
        ]


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read questions as MMLU writes them: question, options, letter of the answer; no header.

    Args:
        path: of the file; its name without `_test`, `_dev` or `_val` is taken for the topic.

    Raises:
        RegardError: where it is missing or empty, a row has too few fields, a letter stands for no option, or
            the number of options changes.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise RegardError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    topic = path.stem
    for ending in ("_test", "_dev", "_val"):
        topic = topic.removesuffix(ending)
    found = [_read(row, number, path, topic.replace("_", " ")) for number, row in enumerate(rows, 1)]
    if not found:
        raise RegardError(f"{path} holds no question.")
    check_options(found)
    return found


def _read(row: list[str], number: int, path: Path, topic: str) -> Question:
    where = f"line {number} of {path}"
    if len(row) < 4:
        raise RegardError(
            f"{where} has {len(row)} fields; give the question, its options and the right letter."
        )
    text, *options, letter = (field.strip() for field in row)
    right = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= right < len(options):
        raise RegardError(
            f"{where} says {letter!r} is right; it has options A to {LETTERS[len(options) - 1]}."
        )
    return Question(text, tuple(options), right, topic)


def check_options(questions: Sequence[Question]) -> int:
    """Return how many options questions have.

    Raises:
        RegardError: where it is not the same for all, or less than 2.
    """
    counts = {len(question.options) for question in questions}
    if len(counts) > 1:
        raise RegardError(f"questions have {min(counts)} to {max(counts)} options; give those of one number.")
    count = counts.pop() if counts else 0
    if count < 2:
        raise RegardError(f"questions have {count} options; a choice needs 2 at least.")
    return count


def simple_questions(count: int = 32, *, seed: int = 0, options: int = 4) -> list[Question]:
    """Return questions that a small model knows the answer to; each place is right as often as the others.

    Args:
        count: how many.
        seed: of kinds, words and order.
        options: from 2 to the number of kinds.

    Example:
        >>> simple_questions(1).pop().text
        'Which of these is a relative?'
    """
    check_count(count)
    if not 2 <= options <= len(KINDS):
        raise RegardError(f"options is {options}; it goes from 2 to {len(KINDS)}.")
    generator = random.Random(seed)
    found = []
    for number in range(count):
        kinds = generator.sample(sorted(KINDS), options)
        words = [generator.choice(KINDS[kind]) for kind in kinds]
        right = number % options
        shown = [*words[1 : right + 1], words[0], *words[right + 1 :]]
        found.append(Question(f"Which of these is {kinds[0]}?", tuple(shown), right))
    return found


def choices(
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    labels: str = "ABCD",
    shots: Sequence[Question] = (),
    style: Style = Style(),
    seed: int = 0,
) -> Choices:
    """Write questions as prompts.

    Args:
        tokenizer: of transformers.
        questions: with as many options each.
        labels: `ABCD` in order; `next`, letters in order that do not begin with A; `random` letters; `1234`;
            `shuffled`, those from A on in another order. Drawn anew for every prompt, shots included.
        shots: questions with their answers in front.
        style: how they are written.
        seed: of labels.

    Raises:
        RegardError: for unknown labels, other numbers of options, or a label that is not one token after the
            prompt, naming it.

    Example:
        >>> asked = choices(tokenizer, simple_questions(8), labels="random")    # doctest: +SKIP
        >>> asked.labels[0]                                                     # doctest: +SKIP
        ('Q', 'C', 'X', 'K')
    """
    import torch

    if labels not in LABELS:
        raise RegardError(f"labels is {labels!r}; it must be one of {', '.join(LABELS)}.")
    count = check_options([*questions, *shots])
    generator = random.Random(seed)
    texts, ids, named, follow, places, ends = [], [], [], [], [], []
    for question in questions:
        chosen = _labels(labels, count, generator)
        front = (
            PREAMBLE.format(about=f" about {question.topic}" if question.topic else "")
            if style.preamble
            else ""
        )
        for shot in shots:
            own = _labels(labels, count, generator)
            front += f"{_asked(shot, own, style)[0]}{own[shot.right]}{style.after.rstrip()}\n\n"
        text, label_ends, option_ends = _asked(question, chosen, style, front)
        tokens = tokenizer(text)["input_ids"]
        texts.append(text)
        ids.append(torch.tensor(tokens))
        named.append(chosen)
        follow.append([_following(tokenizer, text, tokens, label) for label in chosen])
        places.append([_place(tokenizer, text, end, tokens) for end in label_ends])
        ends.append([_place(tokenizer, text, end, tokens) for end in option_ends])
    right = torch.tensor([question.right for question in questions])
    return Choices(
        tuple(questions), tuple(texts), tuple(ids), tuple(named), torch.tensor(follow), right,
        torch.tensor(places), torch.tensor(ends),
    )  # fmt: skip


def _labels(kind: str, count: int, generator: random.Random) -> tuple[str, ...]:
    if kind == "random":
        return tuple(generator.sample(LETTERS, count))
    if kind == "next":
        first = generator.randrange(count, len(LETTERS) - count + 1)
        return tuple(LETTERS[first : first + count])
    if kind == "1234":
        return tuple(str(n + 1) for n in range(count))
    own = list(LETTERS[:count])
    if kind == "shuffled":
        while own == sorted(own):
            generator.shuffle(own)
    return tuple(own)


def _asked(
    question: Question, labels: Sequence[str], style: Style, front: str = ""
) -> tuple[str, list[int], list[int]]:
    """Return a question up to its label, and where labels and options end in it."""
    text = f"{front}Question: {question.text}\n"
    label_ends, option_ends = [], []
    for label, option in zip(labels, question.options, strict=True):
        text += f"{style.before}{label}"
        label_ends.append(len(text))
        text += f"{style.after}{option}"
        option_ends.append(len(text))
        text += "\n"
    return f"{text}Answer: {style.before}".rstrip(" "), label_ends, option_ends


def _following(tokenizer: Any, text: str, tokens: list[int], label: str) -> int:
    """The token of a label after a prompt, with the space that must stand between them where there is one."""
    gap = "" if text.endswith("(") else " "
    whole = tokenizer(f"{text}{gap}{label}")["input_ids"]
    if len(whole) != len(tokens) + 1 or whole[:-1] != tokens:
        raise RegardError(f"the label {label!r} is not one token after {text[-10:]!r}.")
    return int(whole[-1])
