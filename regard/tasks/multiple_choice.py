"""Multiple choice: which of the options is of the kind that is asked for?

    Question: Which of these is an animal?
    A. table
    B. horse
    C. green
    D. London
    Answer:                                            -> " B"

    corrupt="order"      the same question and options in another order, with another right letter
    corrupt="question"   another question of the same form, with another right letter

Each letter is right as often as the others, so that always saying one of them scores 1 / `options`. Places:
`A`, `B`.. (the letters in the list), `option A`.. (the last token of each option) and `END`.

Source: the form is that of Lieberum et al., 2023, arXiv 2307.09458 (theirs are questions of MMLU). Status:
our own words, so that a small model knows the answers.
"""

from __future__ import annotations

import random
from typing import Any

from regard.errors import RegardError
from regard.tasks.prompts import Prompts, Written, check_count, gather_prompts, single_token, single_tokens

KINDS = {
    "an animal": ("horse", "dog", "cat", "lion", "bear", "sheep", "mouse", "wolf"),
    "a colour": ("green", "red", "blue", "yellow", "black", "white", "purple", "brown"),
    "a city": ("London", "Paris", "Rome", "Berlin", "Madrid", "Tokyo", "Vienna", "Moscow"),
    "a number": ("three", "seven", "ten", "five", "nine", "two", "eight", "four"),
    "a tool": ("hammer", "knife", "needle", "drill", "brush"),
    "a part of the body": ("hand", "foot", "eye", "arm", "nose", "knee", "finger"),
    "a month": ("April", "June", "July", "March", "October", "December"),
    "a metal": ("iron", "copper", "gold", "silver", "lead", "zinc"),
    "something to drink": ("water", "milk", "coffee", "tea", "juice", "wine"),
    "a relative": ("mother", "brother", "uncle", "sister", "aunt", "cousin"),
}
LETTERS = "ABCDEFGH"
CORRUPTIONS = ("order", "question")


def multiple_choice(
    tokenizer: Any, count: int = 32, *, seed: int = 0, options: int = 4, corrupt: str = "order"
) -> Prompts:
    """Return questions whose answer is the letter of an option.

    Args:
        tokenizer: of transformers.
        count: how many.
        seed: of kinds, options and their order.
        options: how many a question has, from 2 to 8.
        corrupt: what the other side is, see above.

    Raises:
        RegardError: for another number of options, an unknown corruption, or a tokenizer that splits the
            letters or nearly all options.

    Example:
        >>> multiple_choice(tokenizer, 8).places("END").shape                   # doctest: +SKIP
        torch.Size([8])
    """
    check_count(count)
    if not isinstance(options, int) or not 2 <= options <= len(LETTERS):
        raise RegardError(f"options is {options!r}; it must be a number from 2 to {len(LETTERS)}.")
    if corrupt not in CORRUPTIONS:
        raise RegardError(f"corrupt is {corrupt!r}; it must be one of {', '.join(CORRUPTIONS)}.")
    letters = [single_token(tokenizer, f" {letter}") for letter in LETTERS[:options]]
    if None in letters:
        raise RegardError(f"the tokenizer makes several tokens of ' {LETTERS[letters.index(None)]}'.")
    words = [word for members in KINDS.values() for word in members]
    known, left_out = single_tokens(tokenizer, words, "options", options)
    kinds = {kind: [word for word in members if word in known] for kind, members in KINDS.items()}
    kinds = {kind: members for kind, members in kinds.items() if members}
    if len(kinds) < options:
        raise RegardError(
            f"{len(kinds)} kinds have an option that is one token; {options} options need {options}."
        )
    generator, written = random.Random(seed), []
    ids = [letter for letter in letters if letter is not None]
    for number in range(count):
        right = number % options
        other = generator.choice([i for i in range(options) if i != right])
        asked = generator.sample(sorted(kinds), options)
        shown = [generator.choice(kinds[kind]) for kind in asked]
        clean, places = _text(asked[0], _ordered(generator, shown, right))
        if corrupt == "question":
            asked = generator.sample(sorted(kinds), options)
            shown = [generator.choice(kinds[kind]) for kind in asked]
        off, _ = _text(asked[0], _ordered(generator, shown, other))
        wrong = tuple(letter for place, letter in enumerate(ids) if place != right)
        written.append(Written(clean, off, (ids[right],), wrong, places))
    return gather_prompts("multiple_choice", tokenizer, written, "logit", left_out)


def _ordered(generator: random.Random, shown: list[str], right: int) -> list[str]:
    """The options in any order, with the first of them at `right`."""
    others = shown[1:]
    generator.shuffle(others)
    return [*others[:right], shown[0], *others[right:]]


def _text(kind: str, shown: list[str]) -> tuple[str, dict[str, int]]:
    """Return a question and its places."""
    text, places = f"Question: Which of these is {kind}?\n", {}
    for letter, option in zip(LETTERS, shown, strict=False):
        places[letter] = len(text) + 1
        text += f"{letter}. {option}"
        places[f"option {letter}"] = len(text)
        text += "\n"
    text += "Answer:"
    return text, {**places, "END": len(text)}
