"""What a user gives on the command line: a text, layers, heads, files to write. Checked before any work."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from regard.errors import NoSuchSite, RegardError

TEXT_FILE = re.compile(r"\S+\.(txt|md|py|json|csv|html|tex)|\S*/\S*")
DEEPEST = 10_000
STANDARD = Path("-")
PAGE = "regard-report.html"


def read_text(given: str | None) -> tuple[str, str]:
    """Return a text, and in words where it came from.

    Args:
        given: a file's name, `-` for standard input, the words themselves, or None for the packaged
            passage. A name that ends like a text file's, or holds a slash, must exist.

    Raises:
        RegardError: where the file cannot be read as UTF-8, or the text is empty.
    """
    if given is None:
        passage = resources.files("regard") / "data" / "passage.txt"
        return passage.read_text("utf-8"), "the packaged passage"
    if given == "-":
        text, origin = _decoded(_standard_input(), "Standard input"), "standard input"
    elif _names_file(given):
        text, origin = _decoded(_content(Path(given)), given), given
    else:
        text, origin = _decoded(given.encode("utf-8", "surrogateescape"), "--text"), "the words given"
    if not text.strip():
        raise RegardError(f"The text ({origin}) is empty; give at least two tokens.")
    return text, origin


def _names_file(given: str) -> bool:
    try:
        there = bool(given) and Path(given).exists()
    except (OSError, ValueError):
        return False
    return there or (len(given) < 1000 and TEXT_FILE.fullmatch(given) is not None)


def _standard_input() -> bytes:
    if sys.stdin is None:
        return b""
    stream = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode("utf-8") if stream is None else stream.read()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RegardError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise RegardError(f"{path} is a folder, not a text file.") from None
    except OSError as error:
        raise RegardError(f"{path} cannot be read: {error.strerror}.") from error


def _decoded(content: bytes, origin: str) -> str:
    """Return text in UTF-8, without a byte order mark and with newlines for line ends."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RegardError(f"{origin} is not text in UTF-8.") from None
    if "\0" in text:
        raise RegardError(f"{origin} is not text: it holds zero bytes.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_layers(given: str | None) -> list[int] | None:
    """Return the layer numbers of a list such as `0-5,7`, ascending; None for None.

    Raises:
        RegardError: where it is no such list.
    """
    if given is None:
        return None
    layers: set[int] = set()
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise RegardError(f"--layers takes numbers and ranges such as 0-5,7, and got {given!r}.")
        last = _number(match[2] or match[1], "--layers: no model has a layer")
        layers.update(range(int(match[1]), last + 1))
    return sorted(layers)


def parse_heads(given: str | None) -> list[tuple[int, int]] | None:
    """Return the (layer, head) pairs of a list such as `17.5,18.6`, each once; None for None.

    Raises:
        RegardError: where it is no such list.
    """
    if given is None:
        return None
    heads: dict[tuple[int, int], None] = {}
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", part)
        if match is None:
            raise RegardError(f"--heads takes LAYER.HEAD pairs such as 17.5,18.6, and got {given!r}.")
        layer = _number(match[1], "--heads: no model has a layer")
        heads[layer, _number(match[2], "--heads: no layer has a head")] = None
    return list(heads)


def _number(digits: str, refusal: str) -> int:
    if len(digits) > len(str(DEEPEST)) or int(digits) >= DEEPEST:
        raise RegardError(f"{refusal} {digits[:20]}.")
    return int(digits)


def check_depth(layers: list[int] | None, config: Any) -> None:
    """Refuse a layer beyond the number that a config gives, where it gives one; weights are not needed.

    Raises:
        NoSuchSite: naming the layers there are.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and count > 0:
        _refuse_absent(layers, set(range(count)))


def check_layers(layers: list[int] | None, anatomy: Any) -> None:
    """Refuse a layer whose attention the model does not have, or that cannot be reached.

    Raises:
        NoSuchSite: naming the layers there are.
    """
    _refuse_absent(layers, {site.layer for site in anatomy.sites if site.kind == anatomy.main})


def _refuse_absent(layers: list[int] | None, present: set[int]) -> None:
    absent = [layer for layer in layers or () if layer not in present]
    if absent:
        last = max(present)
        there = f"0 to {last}" if len(present) == last + 1 else ", ".join(map(str, sorted(present)))
        raise NoSuchSite(
            f"--layers: the model has no attention in layer {absent[0]}; it has it in {there}."
            if len(present) <= last
            else f"--layers: the model has no layer {absent[0]}; its layers are {there}."
        )


def check_outputs(json: str | None, csv: str | None) -> tuple[Path | None, Path | None]:
    """Return the paths given; refuse those that cannot be written to, before any work.

    `-` is standard output, and stays `Path("-")`.

    Raises:
        RegardError: naming the option and what is wrong.
    """
    first, second = check_output(json, "--json"), check_output(csv, "--csv")
    if first is not None and second is not None and first.resolve() == second.resolve():
        place = "standard output" if first == STANDARD else str(first)
        raise RegardError(f"--json and --csv both name {place}; give two files.")
    return first, second


def check_report(given: str | None, none: bool, others: tuple[Path | None, ...]) -> Path | None:
    """Return where the page goes, None where none is wanted; refuse what cannot be written to.

    Raises:
        RegardError: naming the option and what is wrong.
    """
    if none:
        if given is not None:
            raise RegardError("--report and --no-report exclude each other; give one.")
        return None
    if given == "-":
        raise RegardError("--report writes a page to a file, and `-` is none; give a file or --no-report.")
    try:
        path = check_output(given or PAGE, "--report")
    except RegardError as error:
        if given is not None:
            raise
        raise RegardError(f"{error} Give another file, or --no-report.") from None
    assert path is not None
    if any(path.resolve() == other.resolve() for other in others if other is not None):
        raise RegardError(f"--report and another option both name {path}; give two files.")
    return path


def check_output(given: str | None, option: str) -> Path | None:
    """Return where a file goes, None where none is wanted; refuse what cannot be written to.

    Raises:
        RegardError: naming the option and what is wrong.
    """
    if given is None:
        return None
    if given == "-":
        return STANDARD
    try:
        path = Path(given).resolve() if Path(given).is_symlink() else Path(given)
        problem = _why_not_writable(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RegardError(f"{option}: {given[:60]!r} is no name for a file: {reason}.") from None
    if problem:
        raise RegardError(f"{option}: {problem}.")
    return path


def _why_not_writable(path: Path) -> str | None:
    folder = path.parent
    if path.is_dir():
        return f"{path} is a folder; give a file's name"
    if not folder.is_dir():
        return f"there is no folder {folder} to write {path.name} to"
    if path.exists() and not path.is_file():
        return f"{path} is no ordinary file"
    if path.exists() and not os.access(path, os.W_OK):
        return f"{path} cannot be written to"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{path} cannot be written to: {error.strerror}"
