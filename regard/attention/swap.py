"""Put a mechanism in the place of a pretrained model's attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.attention.mechanism import Context, LookedAt, Mechanism, State
from regard.attention.registry import Spec
from regard.engines.masks import TensorMask, order_and_padding
from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.carried import Carrier, Carrying, Serves, carried, carry
from regard.runtime.permanent import kept_edit
from regard.runtime.protocol import Edit, Inner, Wanted
from regard.runtime.session import Session

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.site import Site


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Swap(Edit):
    """Compute the attention of some modules by mechanisms; the edit behind `regard.swap`.

    Attributes:
        spec: what the mechanisms were built from.
        mechanisms: attention module -> the mechanism that stands in its place.
    """

    spec: Spec
    mechanisms: Mapping[nn.Module, Mechanism]

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.module in self.mechanisms else None

    def attend(self, call: Call, inner: Inner) -> Tensor:
        mechanism, layer = self._mechanism(call), call.carried
        ctx = context_of(call, mechanism)
        words = mechanism.refuses(ctx)
        if words is not None:
            raise UnsupportedModel(
                f"{call.site.alias} has {words}, which {self.spec!r} cannot take into account."
            )
        if layer is None:
            return mechanism(call.q, call.k, call.v, ctx).to(call.q.dtype)
        out, layer.state = mechanism.step(call.q, call.k, call.v, layer.state, ctx)
        return out.to(call.q.dtype)

    def _mechanism(self, call: Call) -> Mechanism:
        mechanism = self.mechanisms[call.site.module]
        return mechanism.train(call.site.module.training)

    def matrix(self, call: Call) -> Tensor | None:
        """Return the weights by definition, [B, H, T, S]; None where earlier keys are in a state."""
        if call.carried is not None and call.carried.length > call.query_length:
            return None
        mechanism = self._mechanism(call)
        return mechanism.matrix(call.q, call.k, context_of(call, mechanism))

    def looked_at(self, call: Call) -> LookedAt | None:
        """Return which keys rows attend to, as `Mechanism.looked_at`; None for all that they may see."""
        mechanism = self._mechanism(call)
        return mechanism.looked_at(call.q, call.k, context_of(call, mechanism))

    def __repr__(self) -> str:
        return repr(self.spec)


def context_of(call: Call, mechanism: Mechanism) -> Context:
    """Return what a mechanism knows of a call.

    Where it cannot honour every mask, one that came as a tensor is read for what it says.
    """
    if isinstance(call.mask, TensorMask) and "mask" not in mechanism.honours:
        found = order_and_padding(call.mask.tensor)
        if found is not None:
            return replace(_context_of_tensor(call, *found), kept=_kept(call, mechanism))
    return replace(whole_context(call), kept=_kept(call, mechanism))


def whole_context(call: Call) -> Context:
    """Return what a mechanism that honours every mask knows of a call."""
    return Context(
        mask=call.mask, causal=call.causal, offset=call.q_offset - call.kv_offset if call.causal else 0,
        plain=call.plain, valid_queries=call.valid_queries, valid_keys=call.valid_keys, scale=call.scale,
        softcap=call.softcap, bias=call.bias, sink_logits=call.sink_logits, dropout=call.dropout,
    )  # fmt: skip


def _kept(call: Call, mechanism: Mechanism) -> dict[str, Any]:
    return call.run.state(mechanism, call.site, call.part)


def _context_of_tensor(call: Call, causal: bool, valid: Tensor) -> Context:
    """The context of a call whose mask says nothing but order and padding."""
    valid_keys = None if bool(valid.all()) else valid.expand(call.q.shape[0], -1)
    causal = call.causal if call.query_length == 1 else causal
    ctx = Context.of(call.q, call.k, causal=causal, valid=valid_keys)
    return replace(
        ctx, mask=call.mask, scale=call.scale, softcap=call.softcap, bias=call.bias,
        sink_logits=call.sink_logits, dropout=call.dropout,
    )  # fmt: skip


def carrier_of(site: Site, mechanism: Mechanism, spec: Spec, serves: Serves | None = None) -> Carrier | None:
    """Return who keeps the states of a mechanism at a site; None where it reads keys and values."""
    if not mechanism.carries_state or not getattr(site.module, "is_causal", False):
        return None

    def absorb(k: Tensor, v: Tensor, heads: int, valid: Tensor | None) -> State:
        return mechanism.absorb(k, v, heads, Context.of(k, k, valid=valid))

    return Carrier(repr(spec), absorb, site.route, serves)


class SwapSession(Session):
    """A session in which layers compute attention by another mechanism; what `swap` returns.

    Attributes:
        spec: the mechanism's options.
        swapped: the sites whose attention it computes.
        mechanisms: alias -> module of the mechanism; trainable where the mechanism has parameters.
    """

    def __init__(self, model: nn.Module, spec: Spec, layers: Iterable[int | str] | None = None) -> None:
        _check_spec(spec)
        anatomy = anatomy_of(root_of(model))
        require_attention(anatomy)
        self.spec = spec
        self.swapped = _chosen(anatomy, layers)
        built = {site.module: _built(spec, site) for site in self.swapped}
        self.mechanisms = {site.alias: built[site.module] for site in self.swapped}
        self._carrying: list[Carrying] = []
        super().__init__(model, [Swap(spec=spec, mechanisms=built)])

    def __enter__(self) -> SwapSession:
        super().__enter__()
        try:
            for site in self.swapped:
                kept_edit(site.module)
                carrier = carrier_of(site, self.mechanisms[site.alias], self.spec)
                if carrier is not None or carried(site.module):
                    self._carrying.append(carry(site.module, carrier))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        while self._carrying:
            self._carrying.pop().remove()
        super().__exit__(*error)

    def keep(self) -> nn.Module:
        """Make the change permanent and return the model; `regard.unswap(model)` undoes it.

        `save_pretrained` then saves it with the config, and `from_pretrained` brings it back wherever
        `regard` is imported; elsewhere it fails, because it does not know the attention named `regard`.

        Raises:
            UnsupportedModel: where a layer cannot be told from others after loading, or calls
                scaled_dot_product_attention itself, or the mechanism has parameters or centroids.
            RegardError: while a session is open on the model.
        """
        from regard.attention.kept import keep_swap

        return keep_swap(self)


def _check_spec(spec: Any) -> None:
    if isinstance(spec, str):
        raise RegardError(
            f"swap takes a mechanism, and got the name {spec!r}; regard.attention.get({spec!r}) makes one."
        )
    if not isinstance(spec, Spec):
        what = f"the class {spec.__name__}" if isinstance(spec, type) else repr(spec)
        raise RegardError(
            f"swap takes a mechanism with its options, such as SlidingWindow(256), and got {what}."
        )
    if not issubclass(spec.module, Mechanism):
        raise RegardError(f"{spec!r} has no queries, keys and values, so it cannot stand for attention.")


def _built(spec: Spec, site: Site) -> Mechanism:
    """The mechanism of one layer, on the device of that layer."""
    mechanism: Mechanism = spec.build(site)
    devices = {p.device for p in site.module.parameters()} - {torch.device("meta")}
    return mechanism.to(devices.pop()) if len(devices) == 1 else mechanism


def _chosen(anatomy: Anatomy, layers: Iterable[int | str] | None) -> list[Site]:
    if layers is None:
        return [site for site in anatomy.sites if site.kind == anatomy.main]
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise RegardError(f"layers is {layers!r}; it must be several, such as range(3, 30) or [{layers!r}].")
    given = list(layers)
    if not given:
        raise RegardError("swap was given no layers; leave layers= out to mean all of the main stack.")
    found = {site.alias: site for site in map(anatomy.site, given)}
    return list(found.values())


def swap(model: nn.Module, mechanism: Spec, layers: Iterable[int | str] | None = None) -> SwapSession:
    """Open a session in which layers of `model` compute attention by another `mechanism`.

    It works with what the model has computed so far: queries and keys after rotary embedding, values, mask,
    scale. A mechanism that carries a state, such as `LinearAttention`, keeps it in the model's own cache,
    where beams reorder it. Lenses see the weights that the mechanism has by definition.

    Args:
        model: as for `watch`.
        mechanism: its options, such as `SlidingWindow(256)`.
        layers: numbers in the main stack or aliases; default all of the main stack.

    Returns:
        A context manager. Instead of `with`, its `keep()` makes the change permanent and returns the
        model; `unswap` undoes that.

    Raises:
        UnsupportedModel: where the model's attention cannot be reached, or, when run, where the mechanism
            cannot do what a layer needs, such as a position bias.
        NoSuchSite: where `layers` names one that is not there.

    Example:
        >>> with regard.swap(model, SlidingWindow(256), layers=range(3, 30)):    # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    return SwapSession(model, mechanism, layers)
