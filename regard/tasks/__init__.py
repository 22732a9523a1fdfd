"""What models are asked to do: data with seeds, and how answers are scored, one file a task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"BigramBackcopy": "character_pairs", "bigram_backcopy": "character_pairs"}

if TYPE_CHECKING:
    from regard.tasks.character_pairs import BigramBackcopy, bigram_backcopy

__all__ = ["BigramBackcopy", "bigram_backcopy"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"regard.tasks.{_HOME[name]}"), name)
    raise AttributeError(f"module 'regard.tasks' has no attribute {name!r}")
