"""The tasks of prompt pairs by name, for `--task`."""

from __future__ import annotations

from collections.abc import Callable

from regard.errors import RegardError
from regard.tasks.colored_objects import colored_objects
from regard.tasks.docstring import docstring
from regard.tasks.greater_than import greater_than
from regard.tasks.ioi import ioi
from regard.tasks.multiple_choice import multiple_choice
from regard.tasks.prompts import Prompts

PAIRED: dict[str, Callable[..., Prompts]] = {
    "ioi": ioi,
    "greater_than": greater_than,
    "docstring": docstring,
    "colored_objects": colored_objects,
    "multiple_choice": multiple_choice,
}


def paired_task(name: str) -> Callable[..., Prompts]:
    """Return the function `(tokenizer, count, *, seed)` that makes the prompts of a task.

    Args:
        name: with `_` or `-`, such as `greater-than`.

    Raises:
        RegardError: for a name that is none, naming them all.

    Example:
        >>> paired_task("greater-than").__name__
        'greater_than'
    """
    found = PAIRED.get(name.replace("-", "_"))
    if found is None:
        raise RegardError(f"there is no task {name!r}; there are {', '.join(PAIRED)}.")
    return found
