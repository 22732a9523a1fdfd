"""Twelve passages of plain English and twelve of Python, so that numbers have intervals over texts."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Passage:
    """A text of some 150 to 200 tokens.

    Attributes:
        name: one word.
        kind: what sort of text it is, such as `recipe`, `court decision` or `Python`.
        text: one paragraph, or one function.
    """

    name: str
    kind: str
    text: str


def passages() -> list[Passage]:
    """Return the packaged passages, always in the same order.

    Example:
        >>> [passage.name for passage in passages()][:3]
        ['bread', 'storm', 'tenancy']
    """
    return _read("passages.toml")


def code_passages() -> list[Passage]:
    """Return the packaged functions in Python, each of 165 tokens or more, always in the same order.

    Example:
        >>> [passage.name for passage in code_passages()][:3]
        ['as-json', 'split', 'attend-by-blocks']
    """
    return _read("code-passages.toml")


def _read(name: str) -> list[Passage]:
    path = resources.files("regard") / "data" / name
    found = tomllib.loads(path.read_text("utf-8"))["passage"]
    return [Passage(told["name"], told["kind"], told["text"].strip()) for told in found]
