"""Names that name nothing, to hold beside real ones: made of syllables, or of the halves of two real names.

`nonce_names` gives every real name a partner of as many tokens and the same capitals, made of syllables; no
text has it, so how common its words are tells it from a real name. `cross` exchanges the second words of two
real names, "Pablo Picasso" and "Claude Monet" for "Pablo Monet" and "Claude Picasso": the invented names have
the words, the letters and the tokens of the real ones, and nothing but knowledge tells them apart.

Status: our choice; Luo et al., 2023, arXiv 2309.02654, write their invented names by hand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from regard.errors import RegardError
from regard.tasks.word_ranks import word_ranks

_BEGINS = "b br c ch cl d dr f fl g gr h j k kr l m n p pl pr qu r s sk sl st t th tr v w z"
BEGINS = _BEGINS.split()
VOWELS = ["a", "e", "i", "o", "u", "ae", "ea", "io", "ou"]
CLOSES = ["", "", "", "l", "m", "n", "nd", "r", "rt", "s", "st", "th", "x", "ck"]
TRIES = 4000
SHORTEST = 5
"""Letters of an invented word at least: shorter ones are often real."""


def nonce_names(tokenizer: Any, names: Sequence[str], seed: int = 0) -> list[str]:
    """Return for each name an invented one, in its capitals and its number of tokens.

    Args:
        tokenizer: counts the tokens, without a space in front.
        names: real ones, of one or more words.
        seed: of the syllables.

    Raises:
        RegardError: for a name of one token, or of too few for its words: no invented one is so short.

    Example:
        >>> nonce_names(tokenizer, ["Mozart"])                              # doctest: +SKIP
        ['Drumax']
    """
    source = random.Random(f"{seed}/nonce")
    return [_like(tokenizer, name, source) for name in names]


def cross(one: str, other: str) -> tuple[str, str]:
    """Exchange the last words of two names.

    Example:
        >>> cross("Pablo Picasso", "Claude Monet")
        ('Pablo Monet', 'Claude Picasso')
    """
    parts = [name.rpartition(" ") for name in (one, other)]
    if not all(first for first, _, _ in parts):
        raise RegardError(
            f"{one!r} and {other!r} must have two words each for their last words to change places."
        )
    (first, _, last), (second, _, end) = parts
    return f"{first} {end}", f"{second} {last}"


def _like(tokenizer: Any, name: str, source: random.Random) -> str:
    count = _tokens(tokenizer, name)
    for _ in range(TRIES):
        made = " ".join(_cased(_word(source), word) for word in name.split())
        if _tokens(tokenizer, made) == count and not any(w.lower() in word_ranks() for w in made.split()):
            return made
    raise RegardError(f"no invented name has the {count} tokens of {name!r}; take a name of more tokens.")


def _word(source: random.Random) -> str:
    word = ""
    for _ in range(source.choice((1, 2, 2, 3))):
        word += source.choice(BEGINS) + source.choice(VOWELS) + source.choice(CLOSES)
    return word if len(word) >= SHORTEST else _word(source)


def _cased(word: str, like: str) -> str:
    return (
        word.upper() if like.isupper() and len(like) > 1 else word.capitalize() if like[0].isupper() else word
    )


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
