"""The concepts that an instruction is about, by rules: no model, no network.

    candidates   quoted words; names, which are runs of capitalised words, and the rare word after one;
                 runs of up to four content words, one of them rare at least
    merge        two of a recogniser's entities that stand side by side in the text become one
    covered      what is part of a longer one is dropped
    common       what consists of common words is dropped, unless nothing would be left
    rarity       sum over a concept's words of rank / 100; its exponent -r is the paper's product

A word with a capital, or one that is not in the list, has the list's length as its rank.

Source: Luo, Xiao and Ma, 2023, arXiv 2309.02654, and its official code, for everything but the candidates,
which it takes from a recogniser of named entities; any function from a text to a list of strings can stand in
for ours (`entities=`). Status: `drop_covered` and `rarity` agree with the official code; `merge_entities`
does where no word stands in two pairs; the candidates are our choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from regard.errors import RegardError
from regard.tasks.word_ranks import STOP_WORDS, common_words, word_ranks

MOST_WORDS = 4
LINKS = frozenset(
    {"of", "the", "de", "la", "del", "van", "von", "der", "den", "di", "du", "da", "le", "al", "el"}
)
_ASKING = """
affect answer ask calculate cause causes choose classify compare compose compute consider convert create
define describe determine difference discuss discover discovered draft edit elaborate evaluate explain find
generate give happen happened help identify imagine influence invent invented learn let list make mean means
name outline please provide recommend rewrite say show sign signed solve state study suggest summarise
summarize tell translate used using work works write wrote
"""
ASKING = frozenset(_ASKING.split())
_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_QUOTED = re.compile(r"[\"“«]([^\"“”«»\n]{1,80})[\"”»]")


def find_concepts(text: str, entities: Callable[[str], Iterable[str]] | None = None) -> list[str]:
    """Return the concepts of an instruction, in the order of the text; none where it names nothing.

    Args:
        text: in English.
        entities: names the candidates in place of the rules, such as a recogniser of named entities.

    Raises:
        RegardError: for a text that is no string.

    Example:
        >>> find_concepts("Who signed the Treaty of Westphalia, and how did it end the war?")
        ['Treaty of Westphalia']
        >>> find_concepts("How does photosynthesis work?")
        ['photosynthesis']
    """
    if not isinstance(text, str):
        raise RegardError(f"an instruction is a text, not a {type(text).__name__}.")
    found = [str(each).strip() for each in (candidates if entities is None else entities)(text)]
    lowered = text.lower()
    found = list({each.lower(): each for each in reversed(found) if each}.values())
    found.sort(key=lambda each: lowered.find(each.lower()))
    if entities is not None:
        found = merge_entities(found, text)
    kept = set(drop_covered(found))
    found = [each for each in dict.fromkeys(found) if each in kept]
    return [each for each in found if not is_common(each)] or found


def candidates(text: str) -> list[str]:
    """Return what may be a concept: quoted words, names, and runs of content words, not all common."""
    named = [match.group(1).strip() for match in _QUOTED.finditer(text)]
    phrases: list[str] = []
    for run in _runs(_QUOTED.sub(" , ", text)):
        words, spans = [word for word, _ in run], list(_names(run))
        named += [" ".join(words[start:end]) for start, end in spans]
        for start, end in spans:
            words[start:end] = [""] * (end - start)
        phrases += _phrases(words)
    telling = [phrase for phrase in phrases if not is_common(phrase)]
    return named + telling or phrases


def is_common(concept: str) -> bool:
    """Whether a concept is made of common words alone, in small letters."""
    return all(word in common_words() or word in STOP_WORDS for word in concept.split())


def merge_entities(entities: Sequence[str], text: str) -> list[str]:
    """Join two concepts that stand side by side in the text, until none do.

    The official code stops as soon as a round leaves their number as it was, and may leave two that overlap.

    Example:
        >>> merge_entities(["New", "York", "City"], "Where is New York City?")
        ['New York City']
    """
    found = list(dict.fromkeys(entities))
    while merged := next((pair for pair in combinations(found, 2) if _joined(*pair, text)), None):
        place = found.index(merged[0])
        rest = [each for each in found if each not in merged]
        found = [*rest[:place], _joined(*merged, text), *rest[place:]]
        found = list(dict.fromkeys(found))
    return found


def _joined(one: str, other: str, text: str) -> str:
    """What two concepts are together where they stand side by side in the text, else ""."""
    for both in (one + other, f"{one} {other}"):
        at = text.lower().find(both.lower())
        if at >= 0:
            return text[at : at + len(both)]
    return ""


def drop_covered(entities: Sequence[str]) -> list[str]:
    """Return the concepts that are no part of longer ones, the longest first."""
    found: list[str] = []
    for each in sorted(entities, key=len, reverse=True):
        if each not in "".join(found):
            found.append(each)
    return found


def rarity(concept: str, ranks: Mapping[str, int] | None = None) -> float:
    """Return how rare a concept's words are: the paper's r is exp(-this).

    Args:
        concept: one or more words.
        ranks: word -> rank from 1; default `word_ranks()`.

    Example:
        >>> rarity("plate tectonics", {"plate": 50, "the": 1})
        0.52
    """
    known = word_ranks() if ranks is None else ranks
    last = len(known)
    words = [word for word in concept.split(" ") if word]
    return sum(last if word[0].isupper() else known.get(word, last) for word in words) / 100


def by_rarity(concepts: Sequence[str]) -> list[str]:
    """Return concepts, the rarest first; equally rare ones in their order."""
    return sorted(concepts, key=lambda concept: -rarity(concept))


def _runs(text: str) -> Iterator[list[tuple[str, bool]]]:
    """Words between marks of punctuation, each with whether it begins a sentence."""
    begins, at = True, 0
    run: list[tuple[str, bool]] = []
    for match in _WORD.finditer(text):
        between = text[at : match.start()]
        if between.strip() and run:
            yield run
            run = []
        begins = begins or bool(re.search(r"[.!?:\n]", between))
        word = re.sub(r"['’]s$", "", match.group())
        run.append((word, begins))
        if word != match.group():
            yield run
            run = []
        begins, at = False, match.end()
    if run:
        yield run


def _names(run: Sequence[tuple[str, bool]]) -> Iterator[tuple[int, int]]:
    """Where names stand: capitalised words and numbers, small words between them, a rare one after."""
    at = 0
    while at < len(run):
        if not _is_name(*run[at]):
            at += 1
            continue
        end = last = at + 1
        while last < len(run) and (_is_name(*run[last]) or run[last][0] in LINKS):
            last += 1
            end = last if run[last - 1][0] not in LINKS else end
        if end < len(run) and _is_content(run[end][0]) and not is_common(run[end][0]):
            end += 1
        if any(not word[0].isdigit() or word[-1].isalpha() for word, _ in run[at:end]):
            yield at, end
        at = end


def _is_name(word: str, begins: bool) -> bool:
    if not word or word == "I":
        return False
    if word[0].isdigit():
        return True
    small = word.lower()
    if not any(letter.isupper() for letter in word):
        return False
    return not (begins and (small in STOP_WORDS or small in ASKING or small in common_words()))


def _phrases(words: Sequence[str]) -> Iterator[str]:
    """Runs of content words in small letters, four at most; adverbs and asking words end one."""
    phrase: list[str] = []
    for word in [*words, ""]:
        if _is_content(word) and len(phrase) < MOST_WORDS:
            phrase.append(word)
            continue
        if phrase:
            yield " ".join(phrase)
        phrase = [word] if _is_content(word) else []


def _is_content(word: str) -> bool:
    return (
        len(word) > 2 and word.islower() and word[0].isalpha() and not word.endswith("ly")
        and word not in STOP_WORDS and word not in ASKING
    )  # fmt: skip
