"""Twelve passages of plain English, each of another kind, so that numbers have intervals over texts."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Passage:
    """A text of some 150 to 200 tokens.

    Attributes:
        name: one word.
        kind: what sort of text it is, such as `recipe` or `court decision`.
        text: one paragraph.
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
    path = resources.files("regard") / "data" / "passages.toml"
    found = tomllib.loads(path.read_text("utf-8"))["passage"]
    return [Passage(told["name"], told["kind"], told["text"].strip()) for told in found]
