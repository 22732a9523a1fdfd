"""The edits by name, for the command line, the tests and the docs."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from regard.errors import RegardError
from regard.runtime.protocol import Edit

EDITS: dict[str, type[Edit]] = {}


def edit(name: str) -> Callable[[type[Edit]], type[Edit]]:
    """Register a class of edit under `name`.

    Raises:
        RegardError: where the name is taken.
    """

    def register(kind: type[Edit]) -> type[Edit]:
        if name in EDITS:
            raise RegardError(f"edit {name!r} is registered already, as {EDITS[name].__name__}.")
        EDITS[name] = kind
        return kind

    return register


def find_edit(name: str) -> type[Edit]:
    """Return the class registered under `name`.

    Raises:
        RegardError: where there is none; the message names the nearest, or all.

    Example:
        >>> find_edit("scale-heads").__name__
        'ScaleHeads'
    """
    if name in EDITS:
        return EDITS[name]
    near = difflib.get_close_matches(name, EDITS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the edits are {', '.join(sorted(EDITS))}."
    raise RegardError(f"no edit {name!r}; {hint}")
