"""What a mechanism costs, as it declares it, and what else its classes tell: a row of `regard mechanisms`."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from regard.attention.block import Block
from regard.attention.mechanism import Mechanism

if TYPE_CHECKING:
    from regard.attention.registry import Spec


@dataclass(frozen=True, kw_only=True)
class Costs:
    """How time and memory grow, of one head and sequence; T is the length, D the width of a head.

    Attributes:
        time: operations of the whole, such as "T D^2".
        memory: numbers kept besides inputs and outputs while computing it, without gradients.
        step_time: operations of one decoded position; None where it does not decode.
        step_memory: numbers kept between decoded positions; None where it does not decode.
    """

    time: str
    memory: str
    step_time: str | None = None
    step_memory: str | None = None


READS_CACHE = Costs(time="T^2 D", memory="T", step_time="T D", step_memory="T D")
CARRIES_STATE = Costs(time="T D^2", memory="D^2", step_time="D^2", step_memory="D^2")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One registered mechanism, as its classes describe it.

    Attributes:
        name: as `get` takes it.
        spec: the class of its options.
        about: one sentence.
        kind: `heads` where it mixes queries, keys and values, `layer` where it brings its own projections.
        replaces: attention that it can stand for: `causal`, `full`, or both.
        swaps: whether `regard.swap` puts it into a pretrained model.
        honours: what of a pretrained model's attention it takes into account besides order and padding.
        decodes: `cache`, `state` or None.
        use: `training and inference`, or one of them.
        parameters: whether it has any of its own.
        costs: see `Costs`; None where it declares none and none can be derived.
        options: name -> default, or `required`.
        exempt: laws that it breaks by design, and why.
    """

    name: str
    spec: str
    about: str
    kind: str
    replaces: tuple[str, ...]
    swaps: bool
    honours: tuple[str, ...]
    decodes: str | None
    use: str
    parameters: bool
    costs: Costs | None
    options: dict[str, Any]
    exempt: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def describe(kind: type[Spec]) -> Entry:
    """Return what the classes of a registered mechanism say of it.

    Example:
        >>> from regard.attention import SlidingWindow
        >>> entry = describe(SlidingWindow)
        >>> entry.name, entry.decodes, entry.replaces, entry.costs.time
        ('sliding-window', 'cache', ('causal', 'full'), 'T w D')
    """
    module = kind.module
    heads = issubclass(module, Mechanism)
    doc = inspect.getdoc(kind) or ""
    return Entry(
        name=kind.registered,
        spec=kind.__name__,
        about=" ".join(doc.split("\n\n")[0].split()),
        kind="heads" if heads else "layer",
        replaces=tuple(sorted(module.orders)) if issubclass(module, Mechanism) else (_order(module),),
        swaps=heads,
        honours=tuple(sorted(module.honours)) if issubclass(module, Mechanism) else (),
        decodes=_decodes(module),
        use=kind.use,
        parameters=any(True for _ in kind.examples()[0].build().parameters()),
        costs=kind.costs or _derived(module),
        options={f.name: _default(f) for f in fields(kind)},
        exempt=dict(module.exempt),
    )


def _order(module: type[Block]) -> str:
    return "causal" if module.causal else "full"


def _decodes(module: type[Mechanism] | type[Block]) -> str | None:
    if not issubclass(module, Mechanism):
        return "state" if module.causal and callable(getattr(module, "step", None)) else None
    if "causal" not in module.orders:
        return None
    law, way = ("step", "state") if module.carries_state else ("offset", "cache")
    return None if law in module.exempt else way


def _derived(module: type[Mechanism] | type[Block]) -> Costs | None:
    """Costs of the usual ways to compute, where a mechanism declares none."""
    if not issubclass(module, Mechanism):
        return None
    return CARRIES_STATE if module.carries_state else READS_CACHE


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return "required" if field.default_factory is MISSING else field.default_factory()
