"""How many heads an attention layer has, and how wide, for mechanisms with parameters of that shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regard.errors import RegardError, UnsupportedModel

if TYPE_CHECKING:
    from regard.attention.registry import Spec
    from regard.runtime.site import Site


def key_width(spec: Spec, given: int | None, site: Site | None) -> int:
    """Return the width of a head's queries and keys, as given or else as a site has it."""
    return _either(spec, "width", given, site, ("head_dim", "attention_head_size", "qk_head_dim"))


def value_width(spec: Spec, given: int | None, site: Site | None) -> int:
    """Return the width of a head's values, as given or else as a site has it."""
    return _either(spec, "value_width", given, site, ("v_head_dim", "head_dim", "attention_head_size"))


def head_count(spec: Spec, given: int | None, site: Site | None) -> int:
    """Return the number of query heads, as given or else as a site has it."""
    if given is None and site is not None and site.heads is not None:
        return site.heads
    return _either(spec, "heads", given, site, ("num_heads", "num_attention_heads"))


def _either(spec: Spec, name: str, given: int | None, site: Site | None, names: tuple[str, ...]) -> int:
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise RegardError(f"{name} is {given!r}; it must be a whole number from 1.")
        return given
    if site is None:
        raise RegardError(f"{spec!r} has parameters, and needs {name} where no model's layer gives it.")
    holders: tuple[Any, ...] = (site.module, getattr(site.module, "config", None))
    for holder in holders:
        for key in names:
            if isinstance(found := getattr(holder, key, None), int):
                return found
    config = holders[1]
    hidden = getattr(config, "hidden_size", None)
    if isinstance(hidden, int) and site.heads and hidden % site.heads == 0 and name != "heads":
        return hidden // site.heads
    raise UnsupportedModel(
        f"{type(site.module).__name__} ({site.alias}) does not say its {name}; give it to the mechanism."
    )
