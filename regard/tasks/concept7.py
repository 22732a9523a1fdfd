"""Concept-7: questions about 180 concepts of seven domains, 106 real and 74 invented (Luo et al., 2023).

The file is the user's own copy of the authors' `data_knowledge_7_general_multi.csv`; it has no licence and is
not packaged. Columns `Domain`, `Concept`, `Real`, `Label` where it is there, `Questions` and `Entities`; the
last two hold lists in Python's notation, one list of entities a question.

Source: arXiv 2309.02654 and its official code.
"""

from __future__ import annotations

import ast
import csv
from dataclasses import dataclass
from pathlib import Path

from regard.errors import RegardError

COLUMNS = ("Domain", "Concept", "Real", "Questions", "Entities")


@dataclass(frozen=True)
class ConceptQuestion:
    """A question about a concept.

    Attributes:
        domain: such as "Medical".
        concept: its name.
        real: whether there is such a thing.
        question: the text.
        entities: what a recogniser found in it.
    """

    domain: str
    concept: str
    real: bool
    question: str
    entities: tuple[str, ...]


def read_concept7(path: str | Path) -> list[ConceptQuestion]:
    """Return the questions of a file, in its order.

    Raises:
        RegardError: for a file that cannot be read, lacks a column, or holds no such lists.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise RegardError(
            f"cannot read {path}: {getattr(failure, 'strerror', None) or failure}."
        ) from failure
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise RegardError(f"{path} has no rows with the columns {', '.join(missing)}.")
    return [
        question
        for number, row in enumerate(rows, 2)
        for question in _questions(row, f"{path}, row {number}")
    ]


def _questions(row: dict[str, str], place: str) -> list[ConceptQuestion]:
    real = {"TRUE": True, "FALSE": False}.get(str(row["Real"]).strip().upper())
    try:
        texts, named = (ast.literal_eval(row[name]) for name in ("Questions", "Entities"))
        pairs = [(str(text), tuple(map(str, names))) for text, names in zip(texts, named, strict=True)]
    except (ValueError, SyntaxError, TypeError) as failure:
        raise RegardError(f"{place}: Questions and Entities must be lists of one length.") from failure
    if real is None:
        raise RegardError(f"{place}: Real is {row['Real']!r}; it must be TRUE or FALSE.")
    return [ConceptQuestion(row["Domain"], row["Concept"], real, text, names) for text, names in pairs]
