"""Specs: what a user configures, by name, and the module that each builds."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from regard.attention.block import Block
from regard.attention.costs import Costs
from regard.attention.mechanism import Mechanism
from regard.errors import RegardError


@dataclass(frozen=True)
class Spec:
    """The options of a mechanism; a subclass names its module in `module`.

    Options are what JSON can hold, tuples excepted: `to_dict` must give them back.

    Attributes:
        costs: how time and memory grow, for `regard mechanisms`; None for what is usual where keys and values
            are read, or a state is carried.
        use: `training and inference`, or one of the two.
    """

    module: ClassVar[type[Mechanism] | type[Block]]
    registered: ClassVar[str]
    costs: ClassVar[Costs | None] = None
    use: ClassVar[str] = "training and inference"

    def build(self, site: Any = None) -> Any:
        """Return the module of one layer.

        Args:
            site: the `regard.runtime.Site` it is for, where the mechanism depends on the layer.
        """
        return self.module(**{f.name: getattr(self, f.name) for f in fields(self)})

    @property
    def exempt(self) -> dict[str, str]:
        """Laws that the mechanism breaks by design with these options, and why."""
        return self.module.exempt

    def to_dict(self) -> dict[str, Any]:
        """Return the options with the mechanism's name, as JSON can hold them."""
        return {"mechanism": self.registered, **asdict(self)}

    def lengths(self) -> tuple[int, ...]:
        """Return the lengths of sequences that the shared laws try, the longest last."""
        return (0, 1, 7, 19)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        """Return specs that the shared laws try."""
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if needed:
            raise RegardError(f"{cls.__name__} needs {needed[0]}; its examples() must say which to try.")
        return (cls(),)

    @classmethod
    def limit(cls, length: int) -> tuple[Spec, Spec] | None:
        """Return a spec of this kind at full budget and the mechanism it then equals, or None."""
        return None


MECHANISMS: dict[str, type[Spec]] = {}
S = TypeVar("S", bound=type[Spec])


def mechanism(name: str) -> Callable[[S], S]:
    """Register a spec under `name`; `tests/laws` then holds it to its definition.

    Raises:
        RegardError: where the name is taken.
    """

    def register(kind: S) -> S:
        if name in MECHANISMS:
            raise RegardError(f"mechanism {name!r} is registered already, as {MECHANISMS[name].__name__}.")
        MECHANISMS[name] = kind
        kind.registered = name
        return kind

    return register


def get(name: str, **options: Any) -> Spec:
    """Return the spec registered under `name`, with `options`.

    Raises:
        RegardError: where there is none, or it does not take an option or needs another; the message names
            what there is.

    Example:
        >>> get("sliding-window", window=256)
        SlidingWindow(window=256)
    """
    if name not in MECHANISMS:
        near = difflib.get_close_matches(str(name), MECHANISMS, n=3)
        known = ", ".join(sorted(MECHANISMS))
        hint = f"did you mean {' or '.join(near)}?" if near else f"the mechanisms are {known}."
        raise RegardError(f"no mechanism {name!r}; {hint}")
    kind = MECHANISMS[name]
    takes = [f.name for f in fields(kind)]
    unknown = [option for option in options if option not in takes]
    if unknown:
        raise RegardError(f"{name} takes no {unknown[0]!r}; its options are {', '.join(takes) or 'none'}.")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [option for option in needed if option not in options]
    if missing:
        raise RegardError(f"{name} needs {missing[0]!r}, as in get({name!r}, {missing[0]}=...).")
    return kind(**options)


def fitted(given: Mapping[str, Any], known: Mapping[str, Any]) -> Spec:
    """Return the spec that `Spec.to_dict` described, with options it leaves out taken from where it stands.

    Args:
        given: the name, under `mechanism`, and options.
        known: of the layer, such as `dim` and `heads`; those that the spec does not take are left out.

    Example:
        >>> fitted({"mechanism": "qlstm", "reverse": False}, {"dim": 8, "heads": 2})
        QLSTM(dim=8, hidden=None, reverse=False)
    """
    kind = MECHANISMS.get(str(given.get("mechanism")))
    takes = {f.name for f in fields(kind)} if kind is not None else set()
    return from_dict({**{name: value for name, value in known.items() if name in takes}, **given})


def is_block(given: Any) -> bool:
    """Whether a name, spec or module means a mechanism without queries, keys and values.

    Example:
        >>> is_block("softmax"), is_block("qlstm")
        (False, True)
    """
    name = given.get("mechanism") if isinstance(given, Mapping) else given
    kind = MECHANISMS.get(name) if isinstance(name, str) else given
    return issubclass(getattr(kind, "module", type(kind)), Block)


def from_dict(given: Mapping[str, Any]) -> Spec:
    """Return the spec that `Spec.to_dict` described."""
    options = dict(given)
    if "mechanism" not in options:
        raise RegardError(f"{given!r} names no mechanism; it must come from Spec.to_dict().")
    return get(options.pop("mechanism"), **options)
