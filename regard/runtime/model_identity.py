"""What tells one model from another, so that what was found in one is not used on the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError
from regard.runtime.anatomy import anatomy_of, root_of

if TYPE_CHECKING:
    from torch import nn

    from regard.runtime.anatomy import Anatomy

PASSING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "output_attentions")
"""Options of a config that say nothing of what the heads are."""


def identify(model: nn.Module, name: str = "") -> dict[str, Any]:
    """Return what a model is, as plain JSON values.

    The hash is of its config without names and dtypes; weights are not read, so a model and its fine-tunes of
    the same config count as one, as their heads mostly are.

    Args:
        name: what to call it; default what its config says.

    Returns:
        `name`, `class`, `layers` and `heads` of the main stack, and `config`, a hash.
    """
    return identity_of(anatomy_of(root_of(model)), name)


def identity_of(anatomy: Anatomy, name: str = "") -> dict[str, Any]:
    """Return the same from what is known of a model's parts."""
    root = anatomy.root
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    config = getattr(root, "config", None)
    told = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    return {
        "name": name or str(getattr(config, "_name_or_path", "") or type(root).__name__),
        "class": type(root).__name__,
        "layers": len(sites),
        "heads": sum(site.heads or 0 for site in sites),
        "config": hashlib.sha256(_plain(told).encode()).hexdigest()[:16],
    }


def check_same(
    made_for: Mapping[str, Any],
    anatomy: Anatomy,
    what: str = "this list of heads",
    instead: str = "make one for it with `regard heads`",
) -> None:
    """Refuse what was made for another model.

    Args:
        made_for: what `identify` said of the model it was made for.
        what: what was made.
        instead: what a user should do.

    Raises:
        RegardError: naming both.
    """
    here = identity_of(anatomy)
    if any(made_for.get(key) != here[key] for key in ("class", "layers", "heads", "config")):
        raise RegardError(
            f"{what} was made for {_words(made_for)}, and this model is {_words(here)}; {instead}."
        )


def _words(told: Mapping[str, Any]) -> str:
    return (
        f"{told.get('name')} ({told.get('class')}, {told.get('layers')} layers, {told.get('heads')} heads, "
        f"config {str(told.get('config'))[:6]})"
    )


def _plain(told: Any) -> str:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): kept(v) for k, v in value.items() if k not in PASSING}
        return [kept(v) for v in value] if isinstance(value, list | tuple) else value

    return json.dumps(kept(told), sort_keys=True, default=str)
