"""The written forms of a concept: what is blotted out of an explanation, and what has to be guessed back.

Source: Luo, Xiao and Ma, 2023, arXiv 2309.02654, and its official code. Status: `mode="official"` agrees
with it; the default respects the borders of words, so that "art" leaves "start" alone, and takes the rest of
a word that begins with a form of five letters or more ("Paris" in "Parisian").
"""

from __future__ import annotations

import re

from regard.errors import RegardError
from regard.tasks.word_ranks import STOP_WORDS

MARK = "..."
MODES = ("words", "official")
LONG = 5
"""Letters from which on a form at the start of a word takes the whole word."""


def guess_forms(concept: str) -> list[str]:
    """Return the forms of which an answer must contain one: as is, lower, UPPER and Title, each with and
    without a space in front.

    Example:
        >>> guess_forms("Big Ben")
        ['Big Ben', 'big ben', 'BIG BEN', ' Big Ben', ' big ben', ' BIG BEN']
    """
    title = " ".join(word.capitalize() for word in concept.split())
    plain = list(dict.fromkeys([concept, concept.lower(), concept.upper(), title]))
    return [*plain, *(f" {form}" for form in plain)]


def masked_forms(concept: str) -> list[str]:
    """Return the forms that are blotted out, the longest first: of the concept, and of each of its words but
    English stop words; as is, lower, UPPER, Capitalised.
    """
    words = [word for word in re.findall(r"\w+(?:['’-]\w+)*", concept) if word.lower() not in STOP_WORDS]
    found = {
        form for part in (*words, concept) for form in (part, part.lower(), part.upper(), part.capitalize())
    }
    return sorted(found, key=lambda form: (-len(form), form))


def blot_out(text: str, concept: str, mode: str = "words", mark: str = MARK) -> str:
    """Return a text in which the concept cannot be read any more.

    Args:
        text: an explanation, or with mode "official" the whole prompt.
        concept: what to hide.
        mode: "words" looks for whole words, with their endings; "official" replaces every occurrence, inside
            words too.
        mark: what stands there instead.

    Example:
        >>> blot_out("Start with art: the arts, an artist.", "art")
        'Start with ...: the ..., an artist.'
        >>> blot_out("Parisian life in PARIS", "Paris")
        '... life in ...'
    """
    if mode not in MODES:
        raise RegardError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if mode == "official":
        for form in masked_forms(concept):
            text = text.replace(form, mark)
        return text
    parts = [f"{re.escape(form)}{_rest(form)}" for form in masked_forms(concept)]
    return re.sub(rf"(?<!\w)(?:{'|'.join(parts)})", lambda _: mark, text, flags=re.IGNORECASE)


def _rest(form: str) -> str:
    """What may follow a form in its word."""
    if not re.search(r"\w$", form):
        return ""
    return r"\w*(?:['’]s)?" if len(form) >= LONG else r"(?:['’]?s)?(?!\w)"
