"""Tokens as a person can read them, whatever they hold.

A token is told as pieces: text to be shown as it stands, and marks for what cannot be seen, such as a
space, a line's end, a byte that is no letter, a control that turns the direction of writing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from regard.errors import RegardError

MARKS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
HIDDEN = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x2800, 0x3164, 0xFFA0, 0xFFFC, 0xFFFD}
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def pieces(token: str) -> list[str]:
    """Return text and marks by turns, text first; an empty token is one mark.

    Example:
        >>> pieces(" the")
        ['', '·', 'the']
        >>> pieces("a\\u202eb")
        ['a', 'U+202E', 'b']
    """
    if not token:
        return ["", "∅"]
    out = [""]
    for at, letter in enumerate(token):
        mark = _mark(letter)
        if mark is None:
            if not at and unicodedata.category(letter) in ("Mn", "Me"):
                letter = "◌" + letter
            out[-1] += letter
        else:
            out += [mark, ""]
    return out if out[-1] or len(out) == 1 else out[:-1]


def _mark(letter: str) -> str | None:
    if letter in MARKS:
        return MARKS[letter]
    code, kind = ord(letter), unicodedata.category(letter)
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xDC80 <= code <= 0xDCFF:
        return f"{code - 0xDC00:02X}"
    variation = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    if kind[0] in "CZ" or code in HIDDEN or variation:
        return f"U+{code:04X}"
    return None


def words(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token by itself, its white space kept.

    Bytes that are no text by themselves come as lone surrogates U+DC80 to U+DCFF, as Python decodes them.

    Args:
        tokenizer: one of transformers, or anything with `convert_ids_to_tokens`; None gives the ids.
        ids: int [T].
    """
    if tokenizer is None:
        return [f"#{int(i)}" for i in ids]
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if convert is None:
        raise RegardError(
            f"tokens takes a tokenizer or the words themselves; {type(tokenizer).__name__} is neither."
        )
    kind = _kind(tokenizer)
    added = {int(i) for i in getattr(tokenizer, "added_tokens_decoder", {})}
    found = convert([int(i) for i in ids])
    return [
        f"#{int(i)}" if t is None else t if int(i) in added else _text(t, kind)
        for i, t in zip(ids, found, strict=True)
    ]


def _kind(tokenizer: Any) -> str:
    """How a vocabulary writes bytes and spaces: 'bytes', 'spaces' or 'plain'."""
    told = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    if "ByteLevel" in told:
        return "bytes"
    return "spaces" if "▁" in told or "ByteFallback" in told else "plain"


def _text(token: str, kind: str) -> str:
    if kind == "bytes":
        if all(letter in LETTERS for letter in token):
            return bytes(LETTERS[letter] for letter in token).decode("utf-8", "surrogateescape")
        return token
    if kind == "plain":
        return token
    byte = BYTE.fullmatch(token)
    if byte is not None:
        return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
    return token.replace("▁", " ")


def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write the 256 bytes with: printable ones as themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(other)}


LETTERS = _letters()
