"""Later years: a span of years ends after it began.

    The war lasted from the year 1743 to the year 17        -> 44 to 99 rather than 00 to 43
    corrupt: the same from the year 1701, after which all but two endings are right

A tokenizer that has the numbers 00 to 99 as tokens is asked for the two digits. One that takes numbers apart
is asked for the first of them: right are those above the first digit of the year's end, wrong those below.
Then the corrupt side begins at 1701 as well, after which no digit is wrong. Places: `YY` (the last token of
the first year) and `END`.

Source: Hanna et al., 2023, arXiv 2305.00586. Status: our own nouns; the form with single digits is ours.
"""

from __future__ import annotations

import random
from typing import Any

from regard.errors import RegardError
from regard.tasks.prompts import Prompts, Written, check_count, gather_prompts, single_token

NOUNS = (
    "war", "reign", "trade", "voyage", "siege", "famine", "campaign", "expedition", "dispute", "treaty",
    "journey", "drought", "occupation", "alliance", "plague", "project", "construction", "exile",
    "marriage", "friendship",
)  # fmt: skip
CENTURIES = tuple(range(12, 20))


def greater_than(tokenizer: Any, count: int = 32, *, seed: int = 0) -> Prompts:
    """Return prompts that go on with a later year.

    Args:
        tokenizer: of transformers.
        count: how many.
        seed: of nouns and years.

    Raises:
        RegardError: for a tokenizer that has neither two-digit numbers nor digits as tokens.

    Example:
        >>> greater_than(tokenizer, 2).pairs[0].clean                           # doctest: +SKIP
        'The siege lasted from the year 1634 to the year 16'
    """
    check_count(count)
    numbers = _numbers(tokenizer)
    digits = len(numbers) == 10
    generator = random.Random(seed)
    written = []
    for _ in range(count):
        noun, century = generator.choice(NOUNS), generator.choice(CENTURIES)
        begun = generator.randrange(10, 90) if digits else generator.randrange(2, 98)
        at = begun // 10 if digits else begun
        text = "The {noun} lasted from the year {century}{begun:02d} to the year {century}"
        front = f"The {noun} lasted from the year {century}{begun:02d}"
        clean, corrupt = (text.format(noun=noun, century=century, begun=year) for year in (begun, 1))
        wrong = numbers[:at] if digits else numbers[: at + 1]
        places = {"YY": len(front), "END": len(clean)}
        written.append(Written(clean, corrupt, tuple(numbers[at + 1 :]), tuple(wrong), places))
    return gather_prompts("greater_than", tokenizer, written, "probability")


def _numbers(tokenizer: Any) -> list[int]:
    """The tokens that follow a century: 00 to 99, or 0 to 9 where numbers are taken apart."""
    for texts in ([f"{n:02d}" for n in range(100)], [str(n) for n in range(10)]):
        found = [_following(tokenizer, text) for text in texts]
        ids = [one for one in found if one is not None]
        if len(ids) == len(texts):
            return ids
    raise RegardError(
        "the tokenizer has neither 00 to 99 nor the ten digits as tokens after a century, so no token tells "
        "a later year."
    )


def _following(tokenizer: Any, text: str) -> int | None:
    """The token of `text` where it goes on after a century, or None where it is not one that stands alone."""
    front = tokenizer("the year 17")["input_ids"]
    whole = tokenizer(f"the year 17{text}")["input_ids"]
    if len(whole) == len(front) + 1 and whole[:-1] == front:
        return int(whole[-1])
    return single_token(tokenizer, text) if len(text) == 2 else None
