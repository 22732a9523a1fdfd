"""Gates on the heads of a model of transformers, as part of the model.

Every attention module gets a `HeadGate` named `head_gate`: its parameters are the model's, so that an
optimiser and a checkpoint have them. Two hooks do the rest: before the attention, to keep the layer's input,
and before the output projection, to multiply what each head gives. They are methods of the gate, so a copied
or pickled model has its own. Any attention implementation and any cache will do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from regard.attention.gates import GateKind, HeadGate
from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.site import Site

NAME = "head_gate"


class PlacedGate(HeadGate):
    """A gate inside of a model; what `add_gates` puts there."""

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self._input: Tensor | None = None
        self._handles: list[Any] = []

    def place(self, attention: nn.Module, projection: nn.Module) -> None:
        """Put the gate into an attention module and before its output projection."""
        attention.add_module(NAME, self)
        self._handles = [
            attention.register_forward_pre_hook(self.note, with_kwargs=True),
            projection.register_forward_pre_hook(self.multiply),
        ]

    def take_out(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input of the attention module."""
        found = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise UnsupportedModel(
                f"{type(module).__name__} was not given its input [batch, time, {self.dim}] first or as "
                "hidden_states, which a gate reads."
            )
        self._input = found

    def multiply(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Multiply each head's part of the projection's input by its gate."""
        x, self._input = self._input, None
        if x is None:
            raise UnsupportedModel(
                f"{type(module).__name__} ran outside of the attention that it belongs to."
            )
        heads = args[0].unflatten(-1, (self.heads, -1))
        gate = self(x).transpose(1, 2).to(heads.dtype)
        if not self.pooled:
            gate = gate.reshape(*heads.shape[:-1], 1)
        return ((heads * gate).flatten(-2), *args[1:])


def add_gates(
    model: nn.Module,
    *,
    kind: GateKind = "linear",
    start: float = 0.5,
    pooled: bool = False,
    fine_tune: bool = True,
    layers: Iterable[int | str] | None = None,
) -> dict[str, HeadGate]:
    """Put a gate on every head of a model, as part of the model; `remove_gates` takes them out.

    With `fine_tune`, which is for models that are trained already, the gates begin at 1, so that the model is
    what it was, up to their small weights. Without, they begin at `start`, as for a model that is
    trained from scratch.

    Args:
        model: of transformers, or anything with attention that regard can reach.
        kind: what a gate reads, see `regard.attention.gates`.
        start: between 0 and 1, the sigmoid at the beginning.
        pooled: one gate a head and sequence; refused in causal models, as it looks ahead.
        fine_tune: see above.
        layers: numbers in the main stack or aliases; default all of the main stack.

    Returns:
        Alias -> gate, to be trained; they are among `model.parameters()`.

    Raises:
        UnsupportedModel: where attention, or its output projection, cannot be found; it names the class.
        NoSuchSite: where `layers` names one that is not there.
        RegardError: where an option is out of range, or a layer has a gate.

    Example:
        >>> gates = add_gates(model, start=0.25)    # doctest: +SKIP
        >>> optimiser = torch.optim.AdamW(model.parameters())    # doctest: +SKIP
    """
    anatomy = anatomy_of(root_of(model))
    require_attention(anatomy)
    names = [s.alias for s in anatomy.sites if s.kind == anatomy.main] if layers is None else list(layers)
    sites = {site.alias: site for site in map(anatomy.site, names)}
    made: dict[str, PlacedGate] = {}
    for site in sites.values():
        _check_site(site, pooled)
        weight = anatomy.output_weight(site)
        gate = PlacedGate(
            weight.shape[0], weight.shape[1], kind=kind, start=start, pooled=pooled, fine_tune=fine_tune
        )
        made[site.alias] = gate.to(weight.device, weight.dtype)
    if not made:
        raise NoSuchSite("add_gates was given no layers; leave layers= out to mean all of the main stack.")
    projections = {alias: anatomy.output_projection(site) for alias, site in sites.items()}
    for alias, gate in made.items():
        gate.place(sites[alias].module, projections[alias])
    return dict(made)


def remove_gates(model: nn.Module) -> None:
    """Take the gates of `add_gates` out of a model.

    Raises:
        RegardError: where it has none.
    """
    owners = [m for m in model.modules() if isinstance(getattr(m, NAME, None), PlacedGate)]
    if not owners:
        raise RegardError(f"{type(model).__name__} has no gates.")
    for owner in owners:
        gate = getattr(owner, NAME)
        gate.take_out()
        delattr(owner, NAME)


def _check_site(site: Site, pooled: bool) -> None:
    if hasattr(site.module, NAME):
        raise RegardError(f"{site.alias} has a gate already; remove_gates(model) takes gates out.")
    if pooled and getattr(site.module, "is_causal", True):
        raise RegardError(f"{site.alias} is causal, and a pooled gate looks ahead; leave pooled out.")
