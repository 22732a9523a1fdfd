"""Put a mechanism in the place of a pretrained model's attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.attention.mechanism import Context, Mechanism, Spec, State
from regard.engines.masks import Mask
from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.carried import carry, release
from regard.runtime.protocol import Edit, Inner, Wanted
from regard.runtime.session import Session

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.site import Site

NOT_ALWAYS_HONOURED = {"bias": "a position bias", "softcap": "a soft-cap", "sink_logits": "sink logits"}


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
        mechanism = self.mechanisms[call.site.module]
        _check_honoured(mechanism, self.spec, call)
        ctx, layer = context_of(call), call.carried
        if layer is None:
            return mechanism(call.q, call.k, call.v, ctx).to(call.q.dtype)
        out, layer.state = mechanism.step(call.q, call.k, call.v, layer.state, ctx)
        return out.to(call.q.dtype)

    def matrix(self, call: Call) -> Tensor | None:
        """Return the weights by definition, [B, H, T, S]; None where earlier keys are in a state."""
        if call.carried is not None and call.carried.length > call.query_length:
            return None
        return self.mechanisms[call.site.module].matrix(call.q, call.k, context_of(call))

    def __repr__(self) -> str:
        return repr(self.spec)


def context_of(call: Call) -> Context:
    """Return what a mechanism knows of a call."""
    return Context(
        mask=call.mask, causal=call.causal, offset=call.q_offset - call.kv_offset if call.causal else 0,
        plain=call.plain, valid_queries=call.valid_queries, valid_keys=call.valid_keys, scale=call.scale,
        softcap=call.softcap, bias=call.bias, sink_logits=call.sink_logits, dropout=call.dropout,
    )  # fmt: skip


def _check_honoured(mechanism: Mechanism, spec: Spec, call: Call) -> None:
    for name, words in NOT_ALWAYS_HONOURED.items():
        if getattr(call, name) is not None and name not in mechanism.honours:
            raise UnsupportedModel(
                f"{call.site.alias} has {words} on its scores, which {spec!r} cannot take into account."
            )


def carrying(module: nn.Module, mechanism: Mechanism, spec: Spec, route: str) -> RemovableHandle | None:
    """Let a mechanism that carries a state keep it in the caches that `module` is given; None for others."""
    if not mechanism.carries_state or not getattr(module, "is_causal", False):
        return None

    def absorb(k: Tensor, v: Tensor, valid: Tensor | None) -> State:
        heads = k.shape[1] * int(getattr(module, "num_key_value_groups", 1))
        nothing = k.new_zeros(k.shape[0], heads, 0, k.shape[3])
        return mechanism.step(nothing, k, v, None, Context(Mask(0, k.shape[2]), valid_keys=valid))[1]

    return carry(module, repr(spec), absorb, route)


class SwapSession(Session):
    """A session in which layers compute attention by another mechanism; what `swap` returns.

    Attributes:
        mechanisms: alias -> module of the mechanism; trainable where the mechanism has parameters.
    """

    def __init__(self, model: nn.Module, spec: Spec, layers: Iterable[int | str] | None = None) -> None:
        if not isinstance(spec, Spec):
            raise RegardError(f"swap takes a mechanism such as SlidingWindow(256), and got {spec!r}.")
        anatomy = anatomy_of(root_of(model))
        self.swapped = _chosen(anatomy, layers)
        built = {site.module: spec.build(site) for site in self.swapped}
        self.spec = spec
        self._handles: list[RemovableHandle] = []
        self.mechanisms = {site.alias: built[site.module] for site in self.swapped}
        super().__init__(model, [Swap(spec=spec, mechanisms=built)])

    def __enter__(self) -> SwapSession:
        super().__enter__()
        for site in self.swapped:
            handle = carrying(site.module, self.mechanisms[site.alias], self.spec, site.route)
            if handle is not None:
                self._handles.append(handle)
        return self

    def __exit__(self, *error: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        for site in self.swapped:
            release(site.module)
        super().__exit__(*error)

    def keep(self) -> nn.Module:
        """Make the change permanent and return the model; not for use within `with`.

        `save_pretrained` then saves it with the config, and `from_pretrained` brings it back wherever
        `regard` is imported; elsewhere it fails, because it does not know the attention named `regard`.

        Raises:
            UnsupportedModel: where a layer cannot be told from others after loading, or calls
                scaled_dot_product_attention itself.
        """
        from regard.attention.kept import keep_swap

        if self._attachment is not None:
            raise RegardError(
                "keep() was called within `with`; call it on what swap returned, without `with`."
            )
        return keep_swap(self)


def _chosen(anatomy: Anatomy, layers: Iterable[int | str] | None) -> list[Site]:
    if layers is None:
        return [site for site in anatomy.sites if site.kind == anatomy.main]
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
        A context manager. Instead of `with`, its `keep()` makes the change permanent and returns the model.

    Raises:
        UnsupportedModel: where the model's attention cannot be reached, or, when run, where the mechanism
            cannot do what a layer needs, such as a position bias.
        NoSuchSite: where `layers` names one that is not there.

    Example:
        >>> with regard.swap(model, SlidingWindow(256), layers=range(3, 30)):    # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    return SwapSession(model, mechanism, layers)
