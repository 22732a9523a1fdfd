"""Blocks on a plane, as image models have them: what goes into them, and what they then show to lenses.

A block says by `shows` whether it has one map a head ("maps") or rows of weights of its queries ("rows"). A
lens that defines `plane(plane)` is called with each, before the block runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.protocol import Stage, defines
from regard.runtime.run import Run
from regard.runtime.site import Site

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.attachment import Attachment

Grid = tuple[int, int]


def shows_plane(module: nn.Module) -> bool:
    """Whether a module is a block that can be looked at on a plane."""
    methods = (getattr(module, name, None) for name in ("maps", "rows", "grids"))
    return getattr(module, "shows", None) in ("maps", "rows") and all(map(callable, methods))


def refuse_tokens(anatomy: Anatomy, stages: Sequence[Stage]) -> None:
    """Refuse what needs attention between tokens, where all that a model has is on planes.

    Raises:
        UnsupportedModel: naming the first, and what to use.
    """
    if not anatomy.sites or any(site.route != "block" for site in anatomy.sites):
        return
    for stage in stages:
        if not defines(stage, "plane"):
            raise UnsupportedModel(
                f"{type(stage).__name__} needs attention between tokens, and {type(anatomy.root).__name__} "
                "weights positions of an image; look at it with regard.lens.ImageMaps."
            )


def pixels_of(run: Run) -> Tensor | None:
    """Return the images that a forward was given, [B, C, H, W], or None."""
    given = run.kwargs.get("pixel_values")
    for value in (given, *run.kwargs.values(), *run.first_args):
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return value
    return None


@dataclass(frozen=True, eq=False)
class Plane:
    """One call of a block on a plane.

    Attributes:
        run, site: what it is part of.
        x: what went in, the batch first.
        shows: "maps" or "rows".
    """

    run: Run
    site: Site
    x: Tensor

    @property
    def shows(self) -> str:
        return str(self.site.module.shows)

    @property
    def used(self) -> Grid | None:
        """Height and width of the part of the plane that is the image; None for all of it."""
        found: Grid | None = getattr(self.site.module, "used", None)
        return found

    def maps(self) -> Any:
        """Return the block's `Maps`, as it has them in evaluation; of a padded plane the part in use."""
        with _at_rest(self.site.module) as block:
            found = block.maps(self.x)
        if self.used is None:
            return found
        return replace(found, values=found.values[:, :, : self.used[0], : self.used[1]])

    def grids(self) -> tuple[Grid, Grid]:
        """Return height and width of the plane of the queries, and of that of the keys, as far as in use."""
        queries, keys = self._whole()
        if self.used is None:
            return queries, keys
        height, width = (-(-q * u // k) for q, u, k in zip(queries, self.used, keys, strict=True))
        return (height, width), self.used

    def rows(self, item: int, queries: Tensor) -> Tensor:
        """Return the weights of chosen queries of one item of the batch, [1, heads, Q, H W].

        Args:
            item: which.
            queries: int64 [Q], positions on the first plane of `grids`.
        """
        if self.used is not None:
            (_, width), (_, whole) = self.grids()[0], self._whole()[0]
            queries = queries // width * whole + queries % width
        with _at_rest(self.site.module) as block:
            rows: Tensor = block.rows(self.x[item : item + 1], queries)
        if self.used is None:
            return rows
        height, width = self.used
        return rows.unflatten(-1, self._whole()[1])[..., :height, :width].flatten(-2)

    def _whole(self) -> tuple[Grid, Grid]:
        found: tuple[Grid, Grid] = self.site.module.grids(self.x)  # type: ignore[operator]
        return found


@contextmanager
def _at_rest(block: nn.Module) -> Iterator[Any]:
    """A block in evaluation and without autograd, so that looking moves no running mean and draws nothing."""
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        with torch.no_grad():
            yield block
    finally:
        for module, training in modes:
            module.training = training


class PlaneHooks:
    """A hook on every block on a plane, which counts its calls and shows them to the lenses."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles: list[RemovableHandle] = []
        self.looking = False

    def install(self) -> None:
        for module, site in self.attachment.sites.items():
            if site.route == "block":
                hook = self._hook(id(module), site)
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def clear(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, owner: int, site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            from regard.runtime.attachment import in_backward

            if id(module) != owner or self.looking or in_backward():
                return
            called = self.attachment.called
            called[site.alias] = called.get(site.alias, 0) + 1
            x = args[0] if args else next(iter(kwargs.values()))
            self.looking = True
            try:
                self._show(Plane(self.attachment.run_for_call(), site, x.detach()))
            finally:
                self.looking = False

        return hook

    def _show(self, plane: Plane) -> None:
        for lens in self.attachment.lenses:
            if defines(lens, "plane") and (lens.only is None or plane.site.alias in lens.only):
                with torch.no_grad():
                    lens.plane(plane)  # type: ignore[attr-defined]


def refuse_weights(site: Site) -> None:
    """Refuse to give the weights of a block as a matrix over tokens.

    Raises:
        RegardError: saying what to use.
    """
    if site.route == "block":
        raise RegardError(
            f"{site.alias} weights positions of an image, not tokens; keep its maps with "
            "regard.lens.ImageMaps."
        )
