"""Which tokens of a text are what, for `regard diff`: words that the user names, roles, sentences."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from regard.errors import RegardError
from regard.runtime import segments
from regard.runtime.segments import Mark

FIRST, SINKS, REST = "first token", "hidden sinks", "the rest"
MOST, WORDS = 12, 4
SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]+[\"'”’)]*\s*|[^.!?\n]+$")
Places = dict[str, npt.NDArray[np.bool_]]


def parse_spans(given: Sequence[str] | None, text: str) -> list[tuple[str, str]]:
    """Return the names and words that `--span NAME=WORDS` gives.

    Raises:
        RegardError: for what is no NAME=WORDS, a name that is taken, and words that the text does not have.
    """
    found: list[tuple[str, str]] = []
    for each in given or ():
        name, equals, words = each.partition("=")
        if not equals or not name.strip() or not words.strip():
            raise RegardError(f"--span takes NAME=WORDS, such as question='Who came?', and got {each!r}.")
        if name in (FIRST, SINKS, REST, *(known for known, _ in found)):
            raise RegardError(f"--span gives {name!r} twice, or it is a name that diff uses itself.")
        if words not in text:
            raise RegardError(f"--span {name}: the text does not have the words {words!r}.")
        found.append((name, words))
    return found


def as_chat(tokenizer: Any, text: str, model: str) -> tuple[str, list[Mark]]:
    """Return a text as the model's chat template renders it, and where each role's content stands.

    Args:
        text: a user's message, or a JSON list of messages with `role` and `content`.

    Raises:
        RegardError: for a model without a chat template, and a list that holds other things.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RegardError(f"{model} has no chat template; leave --chat out.")
    chat: Any = [{"role": "user", "content": text}]
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            chat = json.loads(text)
    rendered, marks = segments.rendered(tokenizer, chat, chat[-1].get("role") != "assistant")
    roles = {mark.name for mark in marks if "." not in mark.name}
    lone = {role for role in roles if f"{role}.1" not in {mark.name for mark in marks}}
    return rendered, [m for m in marks if m.name in lone or m.name.partition(".")[0] not in lone | {m.name}]


def places(
    tokenizer: Any, text: str, named: Sequence[tuple[str, str]], marks: Sequence[Mark], special: bool
) -> Places:
    """Return which tokens are of which span, bool [T] each; the first token is of none.

    Args:
        named: what the user named; every place where the words stand. Empty for `marks`.
        marks: where the roles of a chat stand; empty for the sentences of the text.
        special: whether the tokenizer adds special tokens.

    Raises:
        RegardError: where spans are named and the tokenizer does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False) and not named:
        return {}
    _, offsets = segments.tokenize(tokenizer, [text], None, special)
    first = segments.first_characters(text, offsets[0]).numpy()
    found: Places = {}
    for mark in [*_words(text, named)] if named else marks or _sentences(text, len(first)):
        here = (first >= mark.start) & (first < mark.stop)
        here[0] = False
        found[mark.name] = found.get(mark.name, np.zeros(len(first), bool)) | here
    return {name: here for name, here in found.items() if named or here.any()}


def _words(text: str, named: Sequence[tuple[str, str]]) -> list[Mark]:
    return [
        Mark(name, at.start(), at.end())
        for name, words in named
        for at in re.finditer(re.escape(words), text)
    ]


def _sentences(text: str, tokens: int) -> list[Mark]:
    """Sentences by number and first words; of a long text, several in a row as one."""
    each = [m for m in SENTENCE.finditer(text) if m.group().strip()]
    least = len(text) / MOST if len(each) > MOST else 0
    marks: list[Mark] = []
    start = 0
    for number, sentence in enumerate(each):
        if sentence.end() - start < least and number < len(each) - 1:
            continue
        words = " ".join(text[start : sentence.end()].split()[:WORDS])
        marks.append(Mark(f"{len(marks) + 1}: {words} …", start, sentence.end()))
        start = sentence.end()
    return marks
