"""Sentences of made words, told apart by a few cue words: which words matter is known.

A sentence has 8 to 24 words. One to three are of 30 that speak for its class; half of the sentences have one
that speaks for the other, where the class has two at least; the others are of 400 that tell nothing. A share
of the labels is wrong. Without cues nothing can be told.

Source: the pilot of Kitada and Iyatomi (2020, arXiv 2009.12064) here. Status: our choice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from regard.errors import RegardError
from regard.tasks.labelled import Labelled

EACH, PLAIN = 30, 400
CUES = tuple(tuple(f"{sign}{n}" for n in range(EACH)) for sign in ("minus", "plus"))
WORDS = tuple(f"word{n}" for n in range(PLAIN))
SHORTEST, LONGEST, MOST_CUES = 8, 24, 3


@dataclass(frozen=True)
class CueSentences(Labelled):
    """Sentences with labels, some of `train` wrong and all of `held_out` right; and some without.

    Attributes:
        unlabelled: texts of the same kind.
        plain: texts without a cue.
        evidence: the words that matter.
    """

    unlabelled: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    evidence: frozenset[str] = frozenset(word for cues in CUES for word in cues)


def cue_sentences(
    train: int = 400, held_out: int = 1000, *, unlabelled: int = 0, plain: int = 0, noise: float = 0.05,
    seed: int = 0,
) -> CueSentences:  # fmt: skip
    """Return made sentences of two classes, `minus` (0) and `plus` (1), half of each.

    Args:
        train, held_out: sentences with a label.
        unlabelled, plain: sentences without one, with and without cues.
        noise: share of wrong labels in `train`.
        seed: of all chance.

    Raises:
        RegardError: for a number of sentences below 1, or a noise that is no share.

    Example:
        >>> made = cue_sentences(4, 2, seed=1)
        >>> [label for _, label in made.held_out], min(len(text.split()) for text, _ in made.train) >= 8
        ([0, 1], True)
    """
    if min(train, held_out) < 1 or min(unlabelled, plain) < 0:
        raise RegardError(f"train is {train} and held_out {held_out}; both must be at least 1.")
    if not 0 <= noise <= 1:
        raise RegardError(f"noise is {noise}; it must be from 0 to 1.")
    source = random.Random(f"cues/{seed}")
    made = [(_sentence(source, n % 2), n % 2) for n in range(train + held_out)]
    taught = [(text, 1 - label if source.random() < noise else label) for text, label in made[:train]]
    return CueSentences(
        tuple(taught),
        tuple(made[train:]),
        ("minus", "plus"),
        tuple(_sentence(source, n % 2) for n in range(unlabelled)),
        tuple(_sentence(source, None) for _ in range(plain)),
    )  # fmt: skip


def _sentence(source: random.Random, label: int | None) -> str:
    length = source.randint(SHORTEST, LONGEST)
    cues: list[str] = []
    if label is not None:
        cues = source.sample(CUES[label], source.randint(1, MOST_CUES))
        if len(cues) > 1 and source.random() < 0.5:
            cues = [*cues, source.choice(CUES[1 - label])]
    words = [*cues, *(source.choice(WORDS) for _ in range(length - len(cues)))]
    source.shuffle(words)
    return " ".join(words)
