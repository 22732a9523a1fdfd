"""Which tokens of texts matter, by spans of characters that somebody marked, or by a list of words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError

Spans = Sequence[tuple[int, int]]


def evidence_of(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    words: Collection[str] = (),
    spans: Mapping[str, Spans] | None = None,
    batch: int = 32,
    longest: int = 256,
) -> list[Tensor]:
    """Return which tokens matter, bool [B, T] a batch, as `coded` makes batches of the same texts.

    Args:
        tokenizer: of transformers, of the fast kind, which knows where tokens stand.
        texts: in their order.
        words: in lower case; every token of such a word matters.
        spans: text -> (start, stop) in characters; a token that overlaps one matters.
        batch, longest: as for `coded`.

    Raises:
        RegardError: where no token of any text matters.

    Example:
        >>> from regard.tasks.labelled import word_tokenizer
        >>> texts = ["a good film", "bad"]
        >>> evidence_of(word_tokenizer(texts, framed=False), texts, words={"good", "bad"})[0].int()
        tensor([[0, 1, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    found = tokenizer(list(texts), truncation=True, max_length=longest, return_offsets_mapping=True)
    rows = []
    for text, places in zip(texts, found["offset_mapping"], strict=True):
        marked = [*(spans or {}).get(text, ()), *_said(text, words)]
        rows.append([any(a < stop and start < b for start, stop in marked) for a, b in places])
    if not any(map(any, rows)):
        raise RegardError("none of the words or spans given as evidence is in the texts.")
    return [_padded(rows[start : start + batch]) for start in range(0, len(rows), batch)]


def _said(text: str, words: Collection[str]) -> list[tuple[int, int]]:
    """Where words stand in a text: runs of letters, digits and apostrophes."""
    found, start = [], None
    for at, letter in enumerate(f"{text} "):
        inside = letter.isalnum() or letter in "'’_"
        if inside and start is None:
            start = at
        elif not inside and start is not None:
            if text[start:at].lower() in words:
                found.append((start, at))
            start = None
    return found


def _padded(rows: Sequence[Sequence[bool]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[False] * (longest - len(row))] for row in rows])
