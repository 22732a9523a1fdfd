"""How common English words are, counted in packaged texts.

Words are ranked by how often they stand in the two packaged novels in small letters, which leaves names out;
modern everyday words that the novels lack (`data/modern-words.txt`, written for this project) share one rank.
A count from elsewhere can take its place wherever `ranks` is asked for, such as one by the package wordfreq.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib import resources

from regard.tasks.corpus import NOVELS

_STOP = """
a about above across after again against all along am among an and any are around as at be because been
before behind being below beside between beyond both but by can cannot could did do does doing down during
each either else ever every few for from further had has have having he her here hers herself him himself
his how however i if in inside into is it its itself just like may me might more most much must my myself
near neither no nor not now of off on once one only onto or other our ours ourselves out outside over own
per rather same shall she should since so some such than that the their theirs them themselves then there
these they this those through thus to too toward towards two under unlike until up upon us very via was we
were what when where whether which while who whom whose why will with within without would yes yet you your
yours yourself yourselves
"""
MODERN = 2500
"""Rank of the modern words: that of words which stand in the novels six times."""
LEAST = 2
"""How often a word of the novels must stand there to count as common."""
STOP_WORDS = frozenset(_STOP.split())
_WORD = re.compile(r"(?<![\w'’-])[a-z]+(?:['’-][a-z]+)*(?![\w'’-])")


@cache
def word_ranks() -> Mapping[str, int]:
    """Return word -> rank from 1, the most frequent first; about 11,000 words.

    Example:
        >>> word_ranks()["the"], word_ranks()["house"] < word_ranks()["well-known"]
        (1, True)
    """
    counts = _counts()
    found = {word: rank for rank, (word, _) in enumerate(counts.most_common(), 1)}
    return {**dict.fromkeys(_modern(), MODERN), **found}


@cache
def common_words() -> frozenset[str]:
    """Return the words that say nothing in particular: those that the novels have twice, and the modern ones.

    Example:
        >>> "house" in common_words(), "photosynthesis" in common_words()
        (True, False)
    """
    return frozenset([word for word, count in _counts().items() if count >= LEAST] + _modern())


@cache
def _counts() -> Counter[str]:
    texts = (resources.files("regard.data").joinpath(f"{name}.txt").read_text("utf-8") for name in NOVELS)
    return Counter(word for text in texts for word in _WORD.findall(text))


@cache
def _modern() -> list[str]:
    return resources.files("regard.data").joinpath("modern-words.txt").read_text("utf-8").split()
