"""Which tokens of a prompt hold a part of it, and which token a word is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regard.errors import NoSuchSite, RegardError, UnsupportedModel


def resolve(
    tokenizer: Any,
    text: str,
    what: str | int,
    occurrence: int | None = None,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Return which tokens of a text hold a part of it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: as it is given to the tokenizer.
        what: a part of the text, or the number of a token: -1 is the last.
        occurrence: which one, where the part occurs several times: 0 is the first, -1 the last.
        add_special_tokens: whether the tokenizer adds its own, as when the model's inputs were made.

    Returns:
        Positions in the unpadded tokens of the text, ascending; a token that the part shares with its
        neighbours is among them.

    Raises:
        NoSuchSite: where the text has no such part, occurrence or token.
        RegardError: where it has several and `occurrence` was not given.
        UnsupportedModel: for a tokenizer that does not tell where its tokens come from.

    Example:
        >>> resolve(tokenizer, "John gave Mary what John had", "John", -1)     # doctest: +SKIP
        [4]
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(f"{type(tokenizer).__name__} does not tell where its tokens are in the text.")
    made = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    offsets = made["offset_mapping"]
    if isinstance(what, int):
        if not -len(offsets) <= what < len(offsets):
            raise NoSuchSite(f"There is no token {what}; the text has {len(offsets)}.")
        return [what % len(offsets)]
    start, stop = _place(text, what, occurrence)
    return [i for i, (begin, end) in enumerate(offsets) if begin < end and begin < stop and end > start]


def token_id(tokenizer: Any, word: str | int | None) -> int | None:
    """Return the id of a word that is one token; an id, or None, is returned as it is.

    Raises:
        RegardError: where it is several tokens, saying which.
    """
    if word is None or isinstance(word, int):
        return word
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise RegardError(
            f"{word!r} is {len(ids)} tokens, {tokens}; give a word that is one token (in most vocabularies "
            "with its leading space), or a token id."
        )
    return int(ids[0])


def _place(text: str, part: str, occurrence: int | None) -> tuple[int, int]:
    """Return where a part of a text begins and ends, white space around it left out."""
    core = part.strip()
    starts = list(_occurrences(text, part)) if core else []
    if not starts:
        raise NoSuchSite(f"The text has no {part!r}: {text[:60]!r}.")
    if occurrence is None and len(starts) > 1:
        raise RegardError(f"{part!r} occurs {len(starts)} times; give occurrence=0, or -1 for the last.")
    which = occurrence or 0
    if not -len(starts) <= which < len(starts):
        raise NoSuchSite(f"{part!r} occurs {len(starts)} times, so there is no occurrence {which}.")
    begin = starts[which] + part.index(core)
    return begin, begin + len(core)


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))
