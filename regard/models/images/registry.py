"""Image models by name; a family is imported when one of its names is asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig

from regard.errors import RegardError
from regard.models.images.base import ImageModel

FAMILIES = {
    "biformer": "regard.models.biformer",
    "dinat": "regard.models.neighborhood",
    "eca_halonext26ts": "regard.models.halonet",
    "halonet": "regard.models.halonet",
    "halonet26t": "regard.models.halonet",
    "halonet50ts": "regard.models.halonet",
    "halonet_h1": "regard.models.halonet",
    "mixer": "regard.models.patches",
    "mobilenet": "regard.models.mobilenet",
    "nat": "regard.models.neighborhood",
    "ninformer": "regard.models.ninformer",
    "sehalonet33ts": "regard.models.halonet",
    "van": "regard.models.van",
    "vit": "regard.models.patches",
}
"""How names begin, up to the first dash -> the module that registers them; a new family adds its line."""

MODELS: dict[str, type[ImageModel]] = {}
M = TypeVar("M", bound=type[ImageModel])


def image_family(*names: str) -> Callable[[M], M]:
    """Register a model under the names that its config's `preset` knows, and with the Auto classes.

    Raises:
        RegardError: where a name is taken, or begins with no family of `FAMILIES`.
    """

    def register(kind: M) -> M:
        for name in names:
            if name in MODELS:
                raise RegardError(f"image model {name!r} is registered already, as {MODELS[name].__name__}.")
            if name.partition("-")[0] not in FAMILIES:
                raise RegardError(f"image model {name!r} begins with no family of regard.models.images.")
        MODELS.update(dict.fromkeys(names, kind))
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
        AutoModelForImageClassification.register(kind.config_class, kind, exist_ok=True)
        return kind

    return register


def image_model(name: str, **options: Any) -> ImageModel:
    """Return an image model with fresh weights.

    Args:
        name: as `image_models()` lists them.
        options: of its config, such as `num_labels=10, num_channels=1`.

    Raises:
        RegardError: where there is none of that name, or its config has no such option.

    Example:
        >>> import torch
        >>> model = image_model("nat-nano", num_labels=10)
        >>> model(torch.randn(2, 3, 32, 32)).logits.shape
        torch.Size([2, 10])
    """
    return _kind(name)(config_of(name, **options))


def config_of(name: str, **options: Any) -> Any:
    """Return the config of a named model; see `image_model`."""
    config: Any = _kind(name).config_class
    takes = ["num_labels", *(field.name for field in dataclasses.fields(config))]
    unknown = [option for option in options if option not in takes]
    if unknown:
        common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        own = [option for option in takes if option not in common]
        near = difflib.get_close_matches(unknown[0], takes, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; its options are {', '.join(own)}."
        raise RegardError(f"{name} takes no {unknown[0]!r}{hint}")
    return config.preset(name, **options)


def image_models() -> list[str]:
    """Return the names of all image models, family by family, as their configs order them.

    Example:
        >>> "nat-mini" in image_models()
        True
    """
    for module in FAMILIES.values():
        importlib.import_module(module)
    return sorted(MODELS, key=lambda name: (name.partition("-")[0], list(MODELS).index(name)))


def _kind(name: Any) -> type[ImageModel]:
    family = FAMILIES.get(str(name).partition("-")[0])
    if family is not None:
        importlib.import_module(family)
    if name not in MODELS:
        known = image_models()
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(known)}."
        raise RegardError(f"no image model {name!r}; {hint}")
    return MODELS[name]
