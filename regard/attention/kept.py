"""Swaps that stay: written into a model's config, and found there again after `from_pretrained`.

The config holds, under `regard`, which attention modules were swapped for what, and the implementation that
was set before. A module is told by its class, its layer and whether it is causal, for it does not know its
own name. Beside it stands `attn_implementation: regard`, so that loading fails, rather than forgets the
swap, without `regard`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from regard.attention.mechanism import Mechanism
from regard.attention.registry import Spec, from_dict
from regard.attention.swap import Swap, carrier_of
from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, lone_site, root_of
from regard.runtime.attachment import BY_MODULE
from regard.runtime.carried import carry
from regard.runtime.implementation import NAME
from regard.runtime.permanent import KEY, drop, in_force, keep, kept_edit, resolve_with

if TYPE_CHECKING:
    from regard.attention.swap import SwapSession
    from regard.runtime.site import Site

MARKS = ("layer_idx", "is_causal", "is_decoder", "is_cross_attention")
Entry = dict[str, Any]


def keep_swap(session: SwapSession) -> nn.Module:
    """Make the swap of a session permanent; see `SwapSession.keep`."""
    _refuse_open(session.root, "keep()")
    for site in session.swapped:
        if site.route != "interface":
            raise UnsupportedModel(
                f"{site.alias} calls scaled_dot_product_attention itself, so a swap of it cannot be kept; "
                "use it in `with`."
            )
        if session.mechanisms[site.alias].state_dict():
            raise UnsupportedModel(
                f"{session.spec!r} has parameters or centroids, which a config cannot hold."
            )
    written = _written(session)
    for site in session.swapped:
        _install(site.module, session.spec, session.mechanisms[site.alias])
    for config, modules in written:
        earlier = getattr(config, KEY, None) or {}
        before = earlier.get("before", config._attn_implementation)
        setattr(config, KEY, {**earlier, "before": before, "swap": modules})
        config._attn_implementation_internal = NAME
    return session.root


def unswap(model: nn.Module) -> nn.Module:
    """Undo every swap kept in a model, or loaded with it, and return the model.

    Its attention is then again as its class computes it, by the implementation that was set before.

    Raises:
        RegardError: where no swap is kept in it, or a session is open on it.

    Example:
        >>> model = regard.swap(model, SlidingWindow(256)).keep()    # doctest: +SKIP
        >>> model = regard.unswap(model)    # doctest: +SKIP
    """
    root = root_of(model)
    modules = [site.module for site in anatomy_of(root).sites]
    if not any(isinstance(kept_edit(module), Swap) for module in modules):
        raise RegardError(f"{type(root).__name__} has no kept swap to undo.")
    _refuse_open(root, "unswap")
    configs = {id(c): c for m in root.modules() if (c := getattr(m, "config", None)) is not None}
    main = getattr(root, "config", None)
    fallback = (getattr(main, KEY, None) or {}).get("before")
    for config in configs.values():
        written = getattr(config, KEY, None)
        if isinstance(written, dict):
            config._attn_implementation_internal = written.get("before", fallback)
            delattr(config, KEY)
        elif fallback is not None and getattr(config, "_attn_implementation_internal", None) == NAME:
            config._attn_implementation_internal = fallback
    for module in modules:
        drop(module)
    return root


def _refuse_open(root: nn.Module, what: str) -> None:
    if any(site.module in BY_MODULE for site in anatomy_of(root).sites):
        raise RegardError(
            f"{what} was called while a session is open on this {type(root).__name__}; leave its `with` "
            "block first."
        )


def _written(session: SwapSession) -> list[tuple[Any, list[Entry]]]:
    """What each config is to hold, earlier swaps included; the root's says that there is something."""
    saved = _saved(getattr(session.root, "config", None))
    readers: dict[int, list[Site]] = {}
    owners: dict[int, Any] = {}
    for site in session.anatomy.sites:
        owner = _owner(site.module, saved)
        if owner is not None:
            readers.setdefault(id(owner), []).append(site)
        if site.alias in session.mechanisms or _kept_spec(site.module) is not None:
            if owner is None:
                raise UnsupportedModel(
                    f"{type(site.module).__name__} reads no config that is saved with the model, so a swap "
                    "of it cannot be kept."
                )
            owners[id(owner)] = owner
    written = []
    for key, owner in owners.items():
        modules = _modules_of(readers[key], session)
        configs = {id(c): c for c in (owner, *(site.module.config for site in readers[key]))}
        written += [(config, modules) for config in configs.values()]
    if saved and all(config is not saved[0] for config, _ in written):
        written.append((saved[0], []))
    return written


def _saved(config: Any) -> list[Any]:
    """A config and those inside of it: what `save_pretrained` writes."""
    if not hasattr(config, "_attn_implementation_internal"):
        return []
    return [config, *(c for value in vars(config).values() for c in _saved(value))]


def _owner(module: nn.Module, saved: list[Any]) -> Any:
    """The saved config that a module will read after loading, or None.

    T5's stacks read copies of the model's.
    """
    config = getattr(module, "config", None)
    if config is None or not saved or any(config is c for c in saved):
        return config
    alike = [c for c in saved if type(c) is type(config)]
    return alike[0] if len(alike) == 1 else None


def _modules_of(sites: list[Site], session: SwapSession) -> list[Entry]:
    """The swapped modules among those that read one config, each kind once."""
    told: dict[str, tuple[Entry, Spec | None, str]] = {}
    for site in sites:
        spec = session.spec if site.alias in session.mechanisms else _kept_spec(site.module)
        entry = _mark(site.module)
        _, other, alias = told.setdefault(repr(entry), (entry, spec, site.alias))
        if other != spec:
            raise UnsupportedModel(
                f"{site.alias} and {alias} cannot be told apart after loading; swap both or neither."
            )
    return [{**entry, **spec.to_dict()} for entry, spec, _ in told.values() if spec is not None]


def _kept_spec(module: nn.Module) -> Spec | None:
    edit = kept_edit(module)
    return edit.spec if isinstance(edit, Swap) else None


def _mark(module: nn.Module) -> Entry:
    """How a module is told from others of the same config."""
    marks = {name: getattr(module, name, None) for name in MARKS}
    return {"class": type(module).__name__, **{k: v for k, v in marks.items() if v is not None}}


def _install(module: nn.Module, spec: Spec, mechanism: Mechanism) -> None:
    drop(module)
    edit = Swap(spec=spec, mechanisms=weakref.WeakKeyDictionary({module: mechanism}))
    carrier = carrier_of(lone_site(module), mechanism, spec, in_force)
    keep(module, edit, carry(module, carrier).remove if carrier is not None else None)


def resolve(module: nn.Module) -> None:
    """Install the swap that the config of an attention module names for it."""
    written = getattr(getattr(module, "config", None), KEY, None)
    if not isinstance(written, dict):
        return
    mark = _mark(module)
    for entry in written.get("swap", []):
        if {k: v for k, v in entry.items() if k in ("class", *MARKS)} == mark:
            spec = from_dict({k: v for k, v in entry.items() if k not in ("class", *MARKS)})
            _install(module, spec, spec.build(lone_site(module)))
            return


resolve_with(resolve)
