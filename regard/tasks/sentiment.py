"""Sentences of two adjectives that both praise or both blame, for prompts whose answer is one word.

    Classify the sentiment of the sentence as positive or negative.
    Sentence: The film was brilliant and charming.
    Sentiment:                                            -> " positive"

Sentences to calibrate on and to test on share no adjective. Status: our choice.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from regard.errors import RegardError

GOOD = (
    "wonderful", "delightful", "charming", "brilliant", "superb", "excellent", "lovely", "pleasant",
    "graceful", "fantastic",
)  # fmt: skip
BAD = (
    "dreadful", "boring", "awful", "clumsy", "terrible", "horrible", "ugly", "miserable", "tedious",
    "disgusting",
)  # fmt: skip
THINGS = ("film", "book", "meal", "play", "song", "hotel", "speech", "garden")
ANSWERS = (" negative", " positive")
PROMPT = "Classify the sentiment of the sentence as positive or negative.\nSentence: {}\nSentiment:"


@dataclass(frozen=True)
class Sentiment:
    """Prompts with their labels, as many of either.

    Attributes:
        calibration, test: (prompt, label) each; label 1 is positive.
        words: the adjectives of the two sets.
    """

    calibration: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    words: tuple[frozenset[str], frozenset[str]]


def sentiment(calibration: int = 24, test: int = 80, *, seed: int = 0) -> Sentiment:
    """Return prompts to calibrate on and to test on.

    Args:
        calibration: how many, at most 320; an odd one has one negative more.
        test: likewise.
        seed: of the split of words, of sentences and of their order.

    Example:
        >>> found = sentiment(2, 4)
        >>> len(found.test), found.words[0] & found.words[1]
        (4, frozenset())
    """
    source = random.Random(f"sentiment/{seed}")
    halves = [source.sample(words, len(words)) for words in (BAD, GOOD)]
    sets, words = [], []
    for number, count in enumerate((calibration, test)):
        own = [half[number::2] for half in halves]
        each = [[(*pair, thing) for pair in itertools.permutations(some, 2) for thing in THINGS]
                for some in own]  # fmt: skip
        if not 1 <= count <= 2 * len(each[0]):
            raise RegardError(f"{count} sentences were asked for; there are 1 to {2 * len(each[0])}.")
        drawn = [source.sample(some, (count + 1 - label) // 2) for label, some in enumerate(each)]
        made = [(PROMPT.format(f"The {thing} was {a} and {b}."), label)
                for label, some in enumerate(drawn) for a, b, thing in some]  # fmt: skip
        source.shuffle(made)
        sets.append(tuple(made))
        words.append(frozenset(own[0] + own[1]))
    return Sentiment(sets[0], sets[1], (words[0], words[1]))
