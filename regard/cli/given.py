"""What a user gives on the command line: a text, layers, and where to write. Checked before any work."""

from __future__ import annotations

import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from regard.errors import NoSuchSite, RegardError


def read_text(given: str | None) -> tuple[str, str]:
    """Return a text, and in words where it came from.

    Args:
        given: a file's name, `-` for standard input, the words themselves, or None for the packaged
            passage. A name that ends like a text file's, or holds a slash, must exist.

    Raises:
        RegardError: where the file cannot be read as UTF-8, or the text is empty.
    """
    if given is None:
        return (resources.files("regard") / "data" / "passage.txt").read_text("utf-8"), "packaged passage"
    if given == "-":
        text, origin = sys.stdin.read(), "standard input"
    elif _names_file(given):
        text, origin = _file(Path(given)), given
    else:
        text, origin = given, "words given"
    if not text.strip():
        raise RegardError(f"The text ({origin}) is empty; give at least two tokens.")
    return text, origin


def _names_file(given: str) -> bool:
    if "\n" in given or len(given) > 1000:
        return False
    return Path(given).exists() or bool(re.fullmatch(r"\S+\.(txt|md|py|json|csv|html|tex)|\S*/\S*", given))


def _file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise RegardError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise RegardError(f"{path} is a folder, not a text file.") from None
    except UnicodeDecodeError:
        raise RegardError(f"{path} is not a text file in UTF-8.") from None
    except OSError as error:
        raise RegardError(f"{path} cannot be read: {error.strerror}.") from error


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
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(layers)


def check_layers(layers: list[int] | None, anatomy: Any) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        NoSuchSite: naming the layers there are.
    """
    present = {site.layer for site in anatomy.sites if site.kind == anatomy.main}
    absent = [layer for layer in layers or () if layer not in present]
    if absent:
        raise NoSuchSite(f"--layers: the model has no layer {absent[0]}; its layers are 0 to {max(present)}.")


def check_output(given: str | None, option: str) -> Path | None:
    """Refuse a path that cannot be written to, before any work.

    Raises:
        RegardError: naming the option and what is wrong.
    """
    if given is None:
        return None
    path = Path(given)
    folder = path.parent
    if path.is_dir():
        raise RegardError(f"{option}: {path} is a folder; give a file's name.")
    if not folder.is_dir():
        raise RegardError(f"{option}: there is no folder {folder} to write {path.name} to.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise RegardError(f"{option}: {path} cannot be written to.")
    return path
