"""A finding: one sentence about numbers, and the heads it is about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a person would say of a lens' numbers.

    Attributes:
        text: one sentence with its numbers and its control.
        heads: `(alias, head)` of the heads it is about, the most telling first; empty where it is about
            none in particular.
        lens: whose numbers.
    """

    text: str
    heads: tuple[tuple[str, int], ...] = ()
    lens: str = ""
