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
    built: list[Mechanism | Block] = [spec.build() for spec in kind.examples()]
    doc = inspect.getdoc(kind) or ""
    return Entry(
        name=kind.registered,
        spec=kind.__name__,
        about=" ".join(doc.split("\n\n")[0].split()),
        kind="heads" if heads else "layer",
        replaces=tuple(sorted({order for one in built for order in orders_of(one)})),
        swaps=heads,
        honours=tuple(sorted(module.honours)) if issubclass(module, Mechanism) else (),
        decodes=next((way for one in built if (way := decodes(one)) is not None), None),
        use=kind.use,
        parameters=any(True for one in built for _ in one.parameters()),
        costs=kind.costs or _derived(module),
        options={f.name: _default(f) for f in fields(kind)},
        exempt=dict(module.exempt),
    )


def orders_of(built: Mechanism | Block) -> frozenset[str]:
    """Return which of `causal` and `full` a built mechanism can be.

    Example:
        >>> from regard.attention import QLSTM
        >>> sorted(orders_of(QLSTM(dim=8).build()))
        ['causal']
    """
    if isinstance(built, Mechanism):
        return built.orders
    return frozenset({"causal" if built.causal else "full"})


def decodes(built: Mechanism | Block) -> str | None:
    """Return what a built mechanism decodes from, `cache` or `state`; None where it does not decode.

    Example:
        >>> from regard.attention import LinearAttention, Softmax
        >>> decodes(Softmax().build()), decodes(LinearAttention().build())
        ('cache', 'state')
    """
    if "causal" not in orders_of(built):
        return None
    if not isinstance(built, Mechanism):
        return "state" if callable(getattr(built, "step", None)) else None
    law, way = ("step", "state") if built.carries_state else ("offset", "cache")
    return None if law in built.exempt and not built.decodes_approximately else way


def _derived(module: type[Mechanism] | type[Block]) -> Costs | None:
    """Costs of the usual ways to compute, where a mechanism declares none."""
    if not issubclass(module, Mechanism):
        return None
    return CARRIES_STATE if module.carries_state else READS_CACHE


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return "required" if field.default_factory is MISSING else field.default_factory()
