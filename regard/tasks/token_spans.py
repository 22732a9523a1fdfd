"""Which tokens of a text are some words in it: by character where the tokenizer tells, else by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COVERED = 0.9


def token_offsets(tokenizer: Any, text: str, special: bool = False) -> list[tuple[int, int]]:
    """Return where each token of a text begins and ends, in characters.

    Args:
        tokenizer: of transformers; where it does not tell, the ends are those of its decoded tokens.
        special: with the tokenizer's own tokens, which begin and end at 0.
    """
    if getattr(tokenizer, "is_fast", False):
        read = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return [(int(begin), int(end)) for begin, end in read["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    ends = [len(tokenizer.decode(ids[: count + 1], skip_special_tokens=True)) for count in range(len(ids))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def find_span(
    tokenizer: Any,
    text: str,
    words: str,
    place: tuple[int, int] | None,
    ids: Sequence[int],
    special: bool = True,
) -> tuple[int, int] | None:
    """Return (first, after the last) token of some words in a text; None where they are not there.

    Args:
        tokenizer: of transformers.
        text: what was tokenized.
        words: what to find.
        place: where they stand, in characters, if that is known. Without it, or without a tokenizer that
            tells characters, the first window of as many tokens whose ids are more than 90 % of those of the
            words, as in the official code of Wu et al., 2024, arXiv 2404.15574.
        ids: the tokens of `text`.
        special: whether `ids` has the tokenizer's own tokens.
    """
    if place is not None and getattr(tokenizer, "is_fast", False):
        begin, end = place
        offsets = token_offsets(tokenizer, text, special)
        inside = [i for i, (low, high) in enumerate(offsets) if low < end and high > begin and high > low]
        return (inside[0], inside[-1] + 1) if inside else None
    for written in (f" {words}", words):
        wanted = tokenizer(written, add_special_tokens=False)["input_ids"]
        distinct = set(wanted)
        for start in range(len(ids) - len(wanted) + 1):
            window = set(ids[start : start + len(wanted)])
            if len(distinct & window) > COVERED * len(distinct):
                return start, start + len(wanted)
    return None
