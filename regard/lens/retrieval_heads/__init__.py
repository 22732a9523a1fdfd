"""Retrieval heads: those that copy a fact out of a long text (Wu et al., 2024, arXiv 2404.15574)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Answers": "answering",
    "Copying": "lens",
    "RetrievalScores": "scores",
    "answer": "answering",
    "detect": "detection",
    "read_official": "official",
    "write_official": "official",
}

if TYPE_CHECKING:
    from regard.lens.retrieval_heads.answering import Answers, answer
    from regard.lens.retrieval_heads.detection import detect
    from regard.lens.retrieval_heads.lens import Copying
    from regard.lens.retrieval_heads.official import read_official, write_official
    from regard.lens.retrieval_heads.scores import RetrievalScores

__all__ = [
    "Answers", "Copying", "RetrievalScores", "answer", "detect", "read_official", "write_official",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"regard.lens.retrieval_heads.{_HOME[name]}"), name)
    raise AttributeError(f"module 'regard.lens.retrieval_heads' has no attribute {name!r}")
