"""Where named pieces of text end up: in a text, in a rendered chat, and among a tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.errors import RegardError


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
    """Return a chat as its template renders it, and where each content, and each named piece, stands."""
    plain = [{**message, "content": _joined(message["content"])} for message in chat]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
    marks: list[Mark] = []
    numbers: dict[str, int] = {}
    cursor = 0
    for message, simple in zip(chat, plain, strict=True):
        role, content = str(message["role"]), simple["content"]
        lead = len(content) - len(content.lstrip())
        core = content.strip()
        at = text.find(core, cursor)
        if at < 0:
            raise RegardError(
                f"The chat template changed the content of message {sum(numbers.values())} ({role}), so its "
                "tokens cannot be told; render the chat yourself and use Spans.from_text."
            )
        cursor = at + len(core)
        number = numbers[role] = numbers.get(role, -1) + 1
        marks += [Mark(role, at, cursor), Mark(f"{role}.{number}", at, cursor)]
        if not isinstance(message["content"], str):
            for piece in marks_of(message["content"], at - lead):
                marks.append(piece._replace(start=max(piece.start, at), stop=min(piece.stop, cursor)))
    return text, marks


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
