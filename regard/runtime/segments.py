"""Where named pieces of text end up: in a text, in a rendered chat, and among a tokenizer's tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.errors import RegardError

SIGN = re.compile("\ue000([0-9]+)\ue001")


class Mark(NamedTuple):
    """Characters `start:stop` of a text are called `name`."""

    name: str
    start: int
    stop: int


def marks_of(pieces: Sequence[tuple[str, str]], start: int = 0) -> list[Mark]:
    """Return where each `(name, text)` piece stands in their concatenation."""
    marks = []
    for piece in pieces:
        if not (isinstance(piece, tuple) and len(piece) == 2 and all(isinstance(p, str) for p in piece)):
            raise RegardError(f"a piece of text is a pair (name, text); got {piece!r}.")
        name, text = piece
        marks.append(Mark(name, start, start + len(text)))
        start += len(text)
    return marks


def rendered(
    tokenizer: Any, chat: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> tuple[str, list[Mark]]:
    """Return a chat as its template renders it, and where each content, and each named piece, stands.

    The chat is rendered once more with a sign in place of each content, which tells what the template adds.

    Raises:
        RegardError: for what is no message, and where the template changed a content.
    """
    for message in chat:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise RegardError(f"a message of a chat has a role and a content; got {message!r}.")
    contents = [_joined(message["content"]) for message in chat]

    def render(contents: list[str]) -> str:
        plain = [{**message, "content": text} for message, text in zip(chat, contents, strict=True)]
        return str(
            tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    text = render(contents)
    starts = _starts(text, render([f"\ue000{number}\ue001" for number in range(len(chat))]), contents)
    marks: list[Mark] = []
    numbers: dict[str, int] = {}
    for message, content, at in zip(chat, contents, starts, strict=True):
        role, stop = str(message["role"]), at + len(content.strip())
        number = numbers[role] = numbers.get(role, -1) + 1
        marks += [Mark(role, at, stop), Mark(f"{role}.{number}", at, stop)]
        if not isinstance(message["content"], str):
            lead = len(content) - len(content.lstrip())
            for piece in marks_of(message["content"], at - lead):
                marks.append(piece._replace(start=max(piece.start, at), stop=min(piece.stop, stop)))
    return text, marks


def _starts(text: str, signed: str, contents: list[str]) -> list[int]:
    """Return where each content, without the space around it, starts in `text`.

    Args:
        signed: the same text with a sign in place of each content.
    """
    first, *rest = SIGN.split(signed)
    found, cursor, whole = dict[int, int](), len(first), text.startswith(first)
    for number, after in zip(map(int, rest[::2]), rest[1::2], strict=True):
        content = contents[number]
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        form = next((f for f in forms if text.startswith(f + after, cursor)), None)
        if form is None:
            whole = False
            break
        found[number] = cursor + len(form) - len(form.lstrip())
        cursor += len(form + after)
    if not whole or cursor != len(text) or len(rest) != 2 * len(contents) or len(found) != len(contents):
        lost = next((n for n in range(len(contents)) if n not in found), 0)
        raise RegardError(
            f"The chat template changed the content of message {lost}, or repeats it, so its tokens cannot "
            "be told; render the chat yourself and use Spans.from_text."
        )
    return [found[number] for number in range(len(contents))]


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    marks_of(content)
    return "".join(text for _, text in content)


def tokenize(
    tokenizer: Any, texts: list[str], padding_side: str | None, add_special_tokens: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokenize a batch.

    Returns:
        The model's inputs, and the offsets of every token [B, S, 2], -1 for special tokens and padding.

    Raises:
        RegardError: for a tokenizer that does not know offsets, or cannot pad.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RegardError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in the text; load a fast "
            "tokenizer."
        )
    if len(texts) > 1 and tokenizer.pad_token_id is None:
        raise RegardError("The tokenizer has no padding token; set tokenizer.pad_token for a batch.")
    options = {} if padding_side is None else {"padding_side": padding_side}
    encoded = tokenizer(
        texts, return_tensors="pt", padding=len(texts) > 1, return_offsets_mapping=True,
        return_special_tokens_mask=True, add_special_tokens=add_special_tokens, **options,
    )  # fmt: skip
    inputs = dict(encoded)
    offsets = inputs.pop("offset_mapping")
    special = inputs.pop("special_tokens_mask").bool()
    empty = offsets[..., 0] == offsets[..., 1]
    return inputs, offsets.masked_fill((special | empty)[..., None], -1)


def first_characters(text: str, offsets: Tensor) -> Tensor:
    """Return the index of each token's first character that is no space, -1 where it has no characters.

    Args:
        offsets: [S, 2].
    """
    found = []
    for start, stop in offsets.tolist():
        inside = (i for i in range(start, stop) if not text[i].isspace())
        found.append(-1 if start < 0 else next(inside, start))
    return torch.tensor(found, dtype=torch.long)
