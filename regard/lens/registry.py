"""The lenses by name, for the command line, the tests and the docs."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from regard.errors import RegardError
from regard.runtime.protocol import Lens

LENSES: dict[str, type[Lens]] = {}


def lens(name: str) -> Callable[[type[Lens]], type[Lens]]:
    """Register a class of lens under `name`.

    Raises:
        RegardError: where the name is taken.
    """

    def register(kind: type[Lens]) -> type[Lens]:
        if name in LENSES:
            raise RegardError(f"lens {name!r} is registered already, as {LENSES[name].__name__}.")
        LENSES[name] = kind
        return kind

    return register


def find_lens(name: str) -> type[Lens]:
    """Return the class registered under `name`.

    Raises:
        RegardError: where there is none; the message names the nearest, or all.

    Example:
        >>> find_lens("entropy").__name__
        'Entropy'
    """
    if name in LENSES:
        return LENSES[name]
    near = difflib.get_close_matches(name, LENSES, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the lenses are {', '.join(sorted(LENSES))}."
    raise RegardError(f"no lens {name!r}; {hint}")
