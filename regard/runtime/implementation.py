"""Setting the attention implementation of a model's configs, and putting back what was there.

`set_attn_implementation` warns and does nothing on some classes, and parses the name; the configs are
set directly instead, and whether each site is really reached is counted.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.runtime.anatomy import Anatomy

NAME = "regard"
DENSE = "regard_dense"
_HELD: dict[int, tuple[Any, str | None, int]] = {}


def _configs(anatomy: Anatomy) -> list[Any]:
    """Configs that decide for a module that calls the interface, each once."""
    owners: list[nn.Module] = [site.module for site in anatomy.sites if site.route == "interface"]
    own = {id(c): c for m in owners if (c := getattr(m, "config", None)) is not None}
    refused = {
        id(c)
        for site in anatomy.sites
        if site.route == "sdpa" and (c := getattr(site.module, "config", None)) is not None
    }
    for module in anatomy.root.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal") and owners:
            own.setdefault(id(config), config)
    return [c for key, c in own.items() if key not in refused]


def hold(anatomy: Anatomy) -> list[Any]:
    """Set the implementation to ours; models that share a config share the hold.

    Returns:
        The configs, for `release`.
    """
    configs = _configs(anatomy)
    name = DENSE if anatomy.needs_dense_masks else NAME
    for config in configs:
        _, previous, count = _HELD.get(id(config), (config, config._attn_implementation_internal, 0))
        _HELD[id(config)] = (config, previous, count + 1)
        config._attn_implementation_internal = name
    return configs


def release(configs: list[Any]) -> None:
    """Undo `hold`."""
    for config in configs:
        _, previous, count = _HELD.pop(id(config))
        if count > 1:
            _HELD[id(config)] = (config, previous, count - 1)
        else:
            config._attn_implementation_internal = previous


def outside(config: Any) -> str | None:
    """Return the implementation that a config has when no session is open; None without a config."""
    held = _HELD.get(id(config))
    return getattr(config, "_attn_implementation_internal", None) if held is None else held[1]
