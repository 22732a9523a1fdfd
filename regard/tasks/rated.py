"""Four reviews with their sentiment, then one without, of an adjective that the other parts do not have.

    Review: The film was great.
    Sentiment: positive
    ...
    Review: The cast was dull.
    Sentiment:

Prompts to find and to test a direction of sentiment with. Status: our choice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from regard.errors import RegardError
from regard.tasks.labelled import BAD, GOOD, THINGS

ONE = "Review: The {thing} was {adjective}.\nSentiment:"
SHOTS = (
    ("film", "great", "positive"), ("music", "terrible", "negative"), ("story", "boring", "negative"),
    ("ending", "excellent", "positive"),
)  # fmt: skip
PREFIX = "".join(ONE.format(thing=t, adjective=a) + f" {s}\n\n" for t, a, s in SHOTS)


@dataclass(frozen=True)
class Rated:
    """Prompts of two sentiments, by part; the two parts share no adjective.

    Attributes:
        positive, negative: to find a direction with.
        asked_positive, asked_negative: to test it on.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    asked_positive: tuple[str, ...]
    asked_negative: tuple[str, ...]


def rated(count: int = 20, *, seed: int = 0) -> Rated:
    """Return prompts, `count` of each sentiment in each part.

    Raises:
        RegardError: for a count that is not from 1 to 72, all there are.

    Example:
        >>> print(rated(1).positive[0].rpartition("\\n\\n")[2])
        Review: The story was funny.
        Sentiment:
    """
    half = len(GOOD) // 2
    most = half * len(THINGS)
    if not 1 <= count <= most:
        raise RegardError(f"count is {count}; it can be 1 to {most}.")
    source = random.Random(f"rated/{seed}")
    parts: list[list[str]] = []
    for words in (GOOD, BAD):
        mixed = source.sample(words, len(words))
        for some in (mixed[:half], mixed[half:]):
            pairs = source.sample([(thing, word) for thing in THINGS for word in some], count)
            parts.append([PREFIX + ONE.format(thing=thing, adjective=word) for thing, word in pairs])
    positive, asked_positive, negative, asked_negative = map(tuple, parts)
    return Rated(positive, negative, asked_positive, asked_negative)
