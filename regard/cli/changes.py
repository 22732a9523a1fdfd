"""Edits and swaps as they are written on the command line: a name, then options as key=value.

scale-heads heads=18.8,20.4 factor=0 mode=mean
sliding-window window=256 layers=3-29
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from regard.cli.given import parse_heads, parse_layers
from regard.errors import RegardError
from regard.runtime.head_list import HeadList
from regard.runtime.protocol import Edit


@dataclass(frozen=True)
class Changes:
    """What is done to a model on one side of a comparison.

    Attributes:
        edits: in the order given.
        swaps: mechanism and layers, None for all.
        words: as they were given.
    """

    edits: Sequence[Edit] = ()
    swaps: Sequence[tuple[Any, list[int] | None]] = ()
    words: str = ""

    def __bool__(self) -> bool:
        return bool(self.edits or self.swaps)

    def check(self, model: Any) -> None:
        """Refuse what does not fit `model`, whose weights need not be there.

        Raises:
            RegardError: naming the layer, head or stage that it lacks.
        """
        from regard.attention.swap import swap
        from regard.runtime.verbs import steer

        if self.edits:
            steer(model, *self.edits)
        for spec, layers in self.swaps:
            swap(model, spec, layers)

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Run the block with the changes in place."""
        from regard.attention.swap import swap
        from regard.runtime.verbs import steer

        with ExitStack() as stack:
            for spec, layers in self.swaps:
                stack.enter_context(swap(model, spec, layers))
            if self.edits:
                stack.enter_context(steer(model, *self.edits))
            yield


def parse_changes(edits: Sequence[str] | None, swaps: Sequence[str] | None) -> Changes:
    """Return the changes that `--edit` and `--swap` ask for.

    Raises:
        RegardError: for an unknown name or option; the message says what there is.
    """
    words = [*(edits or ()), *(swaps or ())]
    return Changes([_edit(w) for w in edits or ()], [_swap(w) for w in swaps or ()], ", ".join(words))


def _edit(words: str) -> Edit:
    from regard.edit import find_edit

    name, options = _split(words, "--edit")
    kind = find_edit(name)
    fields = [f for f in dataclasses.fields(kind) if f.init]
    takes = [f.name for f in fields]
    for option in options:
        if option not in takes:
            raise RegardError(f"--edit: {name} takes no {option!r}; its options are {', '.join(takes)}.")
    for needed in fields:
        required = needed.default is dataclasses.MISSING and needed.default_factory is dataclasses.MISSING
        if required and needed.name not in options:
            raise RegardError(
                f"--edit: {name} needs {needed.name}; what is no plain value is given in Python."
            )
    return kind(**options)


def _swap(words: str) -> tuple[Any, list[int] | None]:
    from regard.attention import get

    name, options = _split(words, "--swap")
    layers = options.pop("layers", None)
    return get(name, **options), layers


def _split(words: str, option: str) -> tuple[str, dict[str, Any]]:
    """The name, and the options by key."""
    try:
        name, *rest = shlex.split(words)
    except ValueError:
        raise RegardError(f"{option} takes a name and key=value options, and got {words!r}.") from None
    options: dict[str, Any] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise RegardError(f"{option} takes key=value options after the name, and got {part!r}.")
        if key in options:
            raise RegardError(f"{option} gives {key} twice.")
        options[key] = _value(key, value)
    return name, options


def _value(key: str, text: str) -> Any:
    if key == "heads":
        return HeadList.load(text) if text.endswith(".json") else parse_heads(text)
    if key == "layers":
        return parse_layers(text)
    if key in ("off", "on"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
