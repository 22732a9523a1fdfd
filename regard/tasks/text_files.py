"""Texts of a user, with labels or without: csv, tsv, jsonl, a folder of classes, rows of a data set.

    FILE.csv, FILE.tsv        columns `text` and `label`                     a share of each class is held out
    FILE.jsonl                {"text": ..., "label": ..., "evidence": [[start, stop], ...]} a line
    FOLDER/good/1.txt ...     a sub-folder a class; FOLDER/train/good and FOLDER/test/good hold out `test`
    rows                      mappings, such as a `Dataset` of the library datasets

`evidence` says which characters matter, where somebody has marked them.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from regard.errors import RegardError
from regard.tasks.labelled import Labelled

HELD_OUT = 0.2
TABLES = {".csv": ",", ".tsv": "\t"}
LINES = {".jsonl", ".ndjson"}
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LabelledTexts(Labelled):
    """Texts with labels, and what matters in them.

    Attributes:
        evidence: text -> (start, stop) in characters, of those where it is known.
    """

    evidence: Mapping[str, Spans] = field(default_factory=dict)


class Unlabelled(NamedTuple):
    """Texts without labels, and whether labels stood beside them, which are not used."""

    texts: list[str]
    labels_ignored: bool


def read_labelled(
    path: str | Path, *, text: str = "text", label: str = "label", held_out: float = HELD_OUT, seed: int = 0
) -> LabelledTexts:
    """Return the texts of a file or folder, some of each class held out.

    Args:
        path: a .csv, .tsv or .jsonl file, or a folder of classes.
        text, label: names of the columns.
        held_out: share of each class, at least one text; not where a folder has `train` and `test`.
        seed: of that share.

    Raises:
        RegardError: where there is no such file, it is of another kind, a column is missing, a row has no
            text or label, there are fewer than two classes, or a class has a single text.

    Example:
        >>> data = read_labelled("reviews.csv")        # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_dir():
        return labelled_rows(_rows(path, (text, label)), text=text, label=label, held_out=held_out, seed=seed,
                             name=str(path))  # fmt: skip
    if (path / "train").is_dir() and (path / "test").is_dir():
        return labelled_rows(_folder(path / "train"), _folder(path / "test"), name=str(path))
    return labelled_rows(_folder(path), held_out=held_out, seed=seed, name=str(path))


def labelled_rows(
    rows: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]] | None = None, *, text: str = "text",
    label: str = "label", held_out: float = HELD_OUT, seed: int = 0, name: str = "the data",
) -> LabelledTexts:  # fmt: skip
    """Return the texts of rows, such as a list of dicts or a `Dataset` of the library datasets.

    Args:
        rows: each with a text and a label, and maybe `evidence`.
        test: what is held out; default a share of each class.
        text, label, held_out, seed: as for `read_labelled`.
        name: of the data, for messages.

    Raises:
        RegardError: as for `read_labelled`.

    Example:
        >>> rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(10)]
        >>> data = labelled_rows(rows)
        >>> data.names, len(data.train), len(data.held_out)
        (('a', 'b'), 8, 2)
    """
    if not 0 < held_out < 1:
        raise RegardError(f"held_out is {held_out}; it must be above 0 and below 1.")
    given = _named(rows, label)
    first, evidence = _pairs(rows, text, label, name, given)
    classes = _classes({key for _, key in first}, given, name)
    number = {key: at for at, key in enumerate(classes)}
    if test is None:
        train, rest = _split(first, held_out, seed, name)
    else:
        train, (rest, more) = first, _pairs(test, text, label, f"the test part of {name}", given)
        evidence |= more
        strange = sorted({key for _, key in rest} - set(classes))
        if strange:
            raise RegardError(
                f"the test part of {name} has the class {strange[0]!r}, which no other text has."
            )
        if not rest:
            raise RegardError(f"the test part of {name} has no text.")
    return LabelledTexts(
        tuple((words, number[key]) for words, key in train),
        tuple((words, number[key]) for words, key in rest), tuple(classes), evidence,
    )  # fmt: skip


def read_unlabelled(path: str | Path, *, text: str = "text", label: str = "label") -> Unlabelled:
    """Return texts without labels: the lines of a .txt file, or the rows of a .csv, .tsv or .jsonl file.

    Raises:
        RegardError: where there is no such file, it is of another kind, or the column is missing.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return Unlabelled([line.strip() for line in _read(path).splitlines() if line.strip()], False)
    rows = list(_rows(path, (text,)))
    texts = [str(row[text]).strip() for row in rows if row.get(text)]
    return Unlabelled(texts, any(row.get(label) not in (None, "") for row in rows))


def read_lexicon(path: str | Path) -> frozenset[str]:
    """Return the words of a file, one a line, in lower case.

    Raises:
        RegardError: where there is no such file, or no word in it.
    """
    words = frozenset(line.split()[0].lower() for line in _read(Path(path)).splitlines() if line.strip())
    if not words:
        raise RegardError(f"{path} has no word.")
    return words


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if path.suffix in TABLES:
        return _table(path, TABLES[path.suffix], columns)
    if path.suffix in LINES:
        return _lines(path)
    if not path.exists():
        raise RegardError(f"there is no file {path}.")
    raise RegardError(f"{path} is of no kind that is read; give .csv, .tsv, .jsonl or a folder of classes.")


def _table(path: Path, delimiter: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(_read(path).splitlines(keepends=True), delimiter=delimiter)
    known = [name for name in reader.fieldnames or ()]
    for name in columns:
        if name not in known:
            raise RegardError(f"{path} has no column {name!r}; its columns are {', '.join(known)}.")
    yield from reader


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RegardError(f"line {number} of {path} is no JSON: {error.msg}.") from None
        if not isinstance(row, dict):
            raise RegardError(f"line {number} of {path} is {type(row).__name__}; it must be an object.")
        yield row


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise RegardError(f"there is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise RegardError(f"{path} cannot be read: {reason}.") from None


def _folder(folder: Path) -> list[dict[str, str]]:
    """A row a .txt file, its class the name of the sub-folder."""
    found = [
        {"text": _read(file), "label": part.name}
        for part in sorted(folder.iterdir())
        if part.is_dir() and not part.name.startswith(".")
        for file in sorted(part.rglob("*.txt"))
    ]
    if not found:
        raise RegardError(
            f"{folder} holds no texts; there must be a sub-folder of .txt files for each class."
        )
    return found


def _pairs(
    rows: Iterable[Mapping[str, Any]], text: str, label: str, name: str, given: list[str] | None
) -> tuple[list[tuple[str, str]], dict[str, Spans]]:
    found: list[tuple[str, str]] = []
    evidence: dict[str, Spans] = {}
    for number, row in enumerate(rows, 1):
        for column in (text, label):
            if column not in row:
                raise RegardError(f"row {number} of {name} has no {column!r}; it has {', '.join(row)}.")
        words, key = row[text], row[label]
        if not isinstance(words, str) or not words.strip():
            raise RegardError(f"row {number} of {name} has no text.")
        if key is None or not str(key).strip():
            raise RegardError(f"row {number} of {name} has no label; texts without one go to `unlabelled`.")
        found.append((words, str(key).strip() if given is None else given[int(key)]))
        if row.get("evidence"):
            evidence[words] = _spans(row["evidence"], words, number, name)
    return found, evidence


def _spans(told: Any, words: str, number: int, name: str) -> Spans:
    """Spans of characters, of a list or of the JSON of one."""
    try:
        spans = json.loads(told) if isinstance(told, str) else told
        found = tuple((int(start), int(stop)) for start, stop in spans)
    except (TypeError, ValueError):
        found = ((-1, -1),)
    if any(not 0 <= start < stop <= len(words) for start, stop in found):
        raise RegardError(
            f"the evidence of row {number} of {name} must be [[start, stop], ...] within its {len(words)} "
            "characters."
        )
    return found


def _named(rows: Iterable[Mapping[str, Any]], label: str) -> list[str] | None:
    """Names of classes that a `Dataset` knows for the numbers in its rows."""
    kind = (getattr(rows, "features", None) or {}).get(label)
    return getattr(kind, "names", None)


def _classes(found: set[str], given: list[str] | None, name: str) -> list[str]:
    if len(found) < 2:
        told = f"one class, {next(iter(found))!r}" if found else "no text"
        raise RegardError(f"{name} has {told}; a classifier needs two classes at least.")
    if given is not None:
        return list(given)
    numbers = all(key.lstrip("-").isdigit() for key in found)
    return sorted(found, key=int) if numbers else sorted(found)


def _split(
    pairs: list[tuple[str, str]], share: float, seed: int, name: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """A share of each class is held out, and at least one text."""
    places: dict[str, list[int]] = {}
    for at, (_, key) in enumerate(pairs):
        places.setdefault(key, []).append(at)
    source, kept = random.Random(f"texts/{seed}"), set()
    for key, of in sorted(places.items()):
        if len(of) < 2:
            raise RegardError(f"the class {key!r} of {name} has one text; two are needed, to hold one out.")
        kept |= set(source.sample(of, min(len(of) - 1, max(1, round(share * len(of))))))
    return [p for at, p in enumerate(pairs) if at not in kept], [pairs[at] for at in sorted(kept)]
