"""Swaps that stay: written into a model's config, and found there again after `from_pretrained`.

The config holds, under `regard`, which attention modules were swapped for what. A module is told by its
class, its layer and whether it is causal, for it does not know its own name. Beside it stands
`attn_implementation: regard`, so that loading fails, rather than forgets the swap, without `regard`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from regard.attention.mechanism import Spec, from_dict
from regard.attention.swap import Swap, carrying
from regard.errors import UnsupportedModel
from regard.runtime.implementation import NAME
from regard.runtime.permanent import KEY, keep, permanent_edits, resolve_with

if TYPE_CHECKING:
    from regard.attention.swap import SwapSession

MARKS = ("layer_idx", "is_causal", "is_decoder", "is_cross_attention")
Entry = dict[str, Any]


def keep_swap(session: SwapSession) -> nn.Module:
    """Make the swap of a session permanent; see `SwapSession.keep`."""
    for site in session.swapped:
        if site.route != "interface":
            raise UnsupportedModel(
                f"{site.alias} calls scaled_dot_product_attention itself, so a swap of it cannot be kept; "
                "use it in `with`."
            )
        if any(True for _ in session.mechanisms[site.alias].parameters()):
            raise UnsupportedModel(f"{session.spec!r} has parameters, which a config cannot hold.")
    entries = _entries(session)
    for site in session.swapped:
        _install(site.module, session.spec, session.mechanisms[site.alias])
    for config, written in entries:
        setattr(config, KEY, written)
        config._attn_implementation_internal = NAME
    root_config = getattr(session.root, "config", None)
    if root_config is not None:
        root_config._attn_implementation_internal = NAME
        root_config.attn_implementation = NAME
    return session.root


def _entries(session: SwapSession) -> list[tuple[Any, dict[str, Any]]]:
    """What each config is to hold, earlier swaps included."""
    swapped = {site.module for site in session.swapped}
    configs = {id(c): c for module in swapped if (c := getattr(module, "config", None)) is not None}
    if any(getattr(module, "config", None) is None for module in swapped):
        raise UnsupportedModel(f"{type(session.root).__name__} has attention modules without a config.")
    found = []
    for config in configs.values():
        told: dict[str, tuple[Entry, Spec | None, str]] = {}
        for site in session.anatomy.sites:
            if getattr(site.module, "config", None) is not config:
                continue
            spec = session.spec if site.module in swapped else _kept_spec(site.module)
            entry = _mark(site.module)
            _, other, alias = told.setdefault(repr(entry), (entry, spec, site.alias))
            if other != spec:
                raise UnsupportedModel(
                    f"{site.alias} and {alias} cannot be told apart after loading; swap both or neither."
                )
        modules = [{**entry, **spec.to_dict()} for entry, spec, _ in told.values() if spec is not None]
        found.append((config, {"swap": modules}))
    return found


def _kept_spec(module: nn.Module) -> Spec | None:
    return next((edit.spec for edit in permanent_edits(module) if isinstance(edit, Swap)), None)


def _mark(module: nn.Module) -> Entry:
    """How a module is told from others of the same config."""
    marks = {name: getattr(module, name, None) for name in MARKS}
    return {"class": type(module).__name__, **{k: v for k, v in marks.items() if v is not None}}


def _install(module: nn.Module, spec: Spec, mechanism: Any) -> Swap:
    for before in permanent_edits(module):
        handle = getattr(before, "handle", None)
        if handle is not None:
            handle.remove()
    edit = Swap(spec=spec, mechanisms={module: mechanism})
    object.__setattr__(edit, "handle", carrying(module, mechanism, spec, "interface"))
    keep(module, edit)
    return edit


def resolve(module: nn.Module) -> Swap | None:
    """Return the swap that the config of an attention module names for it, and install it."""
    written = getattr(getattr(module, "config", None), KEY, None)
    if not isinstance(written, dict):
        return None
    mark = _mark(module)
    for entry in written.get("swap", []):
        if {k: v for k, v in entry.items() if k in mark} == mark:
            spec = from_dict({k: v for k, v in entry.items() if k not in ("class", *MARKS)})
            return _install(module, spec, spec.build())
    return None


resolve_with(resolve)
