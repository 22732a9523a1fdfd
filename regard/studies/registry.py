"""The studies by name, for the command line, the tests and the docs.

A study's file imports nothing heavy at its top, so that all of them can be listed at once. What it is made
of may: files whose names end as in `PARTS` are imported by their study alone.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from regard.errors import RegardError
from regard.studies.base import Study, check_study

STUDIES: dict[str, type[Study]] = {}
PARTS = ("_parts", "_language", "_picture")
Kind = TypeVar("Kind", bound=type[Study])


def study(slug: str) -> Callable[[Kind], Kind]:
    """Register a class of study under `slug`, the name of its system everywhere.

    Raises:
        RegardError: where the name is taken, or the study's claims cannot be tested as they stand.
    """

    def register(kind: Kind) -> Kind:
        if slug in STUDIES:
            raise RegardError(f"study {slug!r} is registered already, as {STUDIES[slug].__name__}.")
        kind.slug = slug
        check_study(kind)
        STUDIES[slug] = kind
        return kind

    return register


def all_studies() -> dict[str, type[Study]]:
    """Import every study of this folder and return the studies by name, in alphabetical order."""
    import regard.studies

    for module in pkgutil.iter_modules(regard.studies.__path__, "regard.studies."):
        if not module.name.endswith(PARTS):
            importlib.import_module(module.name)
    return dict(sorted(STUDIES.items()))


def find_study(slug: str) -> type[Study]:
    """Return the study registered under `slug`.

    Raises:
        RegardError: where there is none; the message names the nearest, or all.
    """
    known = all_studies()
    if slug in known:
        return known[slug]
    near = difflib.get_close_matches(slug, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the studies are {', '.join(known)}."
    raise RegardError(f"no study {slug!r}; {hint}")
