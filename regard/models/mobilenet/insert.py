"""Subspace attention in any convolutional network: after layers, or in their place, and what that costs.

    after: [names]      x = ulsam(layer(x))
    replace: [names]    x = ulsam(x), where the layer kept the shape of x

Which channels a layer has is found by a run without numbers. Source: Saini et al., 2020, arXiv 2006.15102,
section 4. Status: partly our choice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.ulsam import ULSAM
from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.models.images.cost import Cost, cost, short


@dataclass(frozen=True, eq=False)
class Inserted:
    """A network with subspace attention, and what that changed.

    Attributes:
        model: a copy of the network given.
        before, after: parameters and multiply-adds.
        places: name of each subspace attention in the model -> its channels.
    """

    model: nn.Module
    before: Cost
    after: Cost
    places: dict[str, int]

    def __str__(self) -> str:
        parameters = self.after.parameters / self.before.parameters - 1
        operations = self.after.multiply_adds / max(1, self.before.multiply_adds) - 1
        return (
            f"parameters {short(self.before.parameters)} -> {short(self.after.parameters)} "
            f"({parameters:+.1%}), multiply-adds {short(self.before.multiply_adds)} -> "
            f"{short(self.after.multiply_adds)} ({operations:+.1%})"
        )


def insert_ulsam(
    model: nn.Module, *, after: Sequence[str] = (), replace: Sequence[str] = (), groups: int = 4,
    norm: bool = True, image_size: int | tuple[int, int] = 224, channels: int | None = None,
) -> Inserted:  # fmt: skip
    """Return a copy of a network with subspace attention after some layers, or in their place.

    A layer with attention after it becomes `Sequential(layer, ULSAM)`: its weights go by `NAME.0.`. What is
    inserted has fresh weights, and the layers' device and dtype.

    Args:
        model: of images [B, channels, H, W]; torchvision's and timm's MobileNets, or any other.
        after, replace: names of modules, as `model.named_modules()` has them.
        groups, norm: see `ULSAM`.
        image_size: of the run that finds shapes, and of the counts.
        channels: of the image; by default those of the model's config, or 3.

    Raises:
        NoSuchSite: where the model has no module of a name.
        ShapeMismatch: where a layer to be replaced changes the shape, or gives no map; with both shapes.
        RegardError: where no layer is named, or one twice, or channels and groups do not fit.

    Example:
        >>> plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1))
        >>> found = insert_ulsam(plain, replace=["1"], image_size=32)
        >>> print(found, found.places)
        parameters 808 -> 276 (-65.8%), multiply-adds 203 k -> 57.3 k (-71.7%) {'1': 8}
    """
    names = [*after, *replace]
    if isinstance(after, str) or isinstance(replace, str) or not names or len(set(names)) < len(names):
        raise RegardError(f"after is {after!r} and replace {replace!r}; they must list names, each once.")
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            near = [other for other in known if other.count(".") <= name.count(".")][1:9]
            raise NoSuchSite(f"the model has no module {name!r}; it has {', '.join(near)}.")
        inner = [other for other in names if other.startswith(f"{name}.")]
        if inner:
            raise RegardError(f"{inner[0]} is inside {name}; name one of them.")
    before = cost(model, image_size, channels)
    shapes = _shapes(model, names, before.image_size, _channels(model, channels))
    made = copy.deepcopy(model)
    places = {}
    for name in names:
        layer = made.get_submodule(name)
        width = _width(name, shapes.get(name), name in replace)
        attention = ULSAM(width, groups, norm).to(_like(made, layer)).train(layer.training)
        made.set_submodule(name, attention if name in replace else nn.Sequential(layer, attention))
        places[name if name in replace else f"{name}.1"] = attention.channels
    return Inserted(made, before, cost(made, image_size, channels), places)


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _channels(model: nn.Module, channels: int | None) -> int:
    return int(getattr(getattr(model, "config", None), "num_channels", 3)) if channels is None else channels


def _like(model: nn.Module, layer: nn.Module) -> Tensor:
    """A parameter of the layer, or of the model, whose device and dtype count."""
    return next(iter([*layer.parameters(), *model.parameters()]), torch.zeros(0))


def _shapes(
    model: nn.Module, names: Sequence[str], size: tuple[int, int], channels: int
) -> dict[str, Shapes]:
    """The shapes that each module takes and gives, found on the meta device."""
    hollow: Any = copy.deepcopy(model).to("meta").eval()
    found: dict[str, Shapes] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if name in found:
                raise RegardError(f"{name} runs twice in a forward, where attention would be shared.")
            x = given[0] if given else None
            found[name] = (tuple(getattr(x, "shape", ())), tuple(getattr(out, "shape", ())))

        return hook

    for name in names:
        hollow.get_submodule(name).register_forward_hook(watch(name))
    with torch.no_grad():
        hollow(torch.empty(1, channels, *size, device="meta", dtype=_like(model, model).dtype))
    return found


def _width(name: str, shapes: Shapes | None, replaced: bool) -> int:
    taken, given = shapes or ((), ())
    if replaced and taken != given:
        raise ShapeMismatch(
            f"{name} takes {list(taken)} and gives {list(given)}; subspace attention can replace only what "
            "keeps the shape."
        )
    if len(given) != 4:
        raise ShapeMismatch(f"{name} gives {list(given)}; it must give [batch, channels, height, width].")
    return int(given[1])
