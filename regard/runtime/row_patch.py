"""Patches of which each applies to a part of the batch only, and what is at points of a model to patch in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.errors import NothingObserved, RegardError, ShapeMismatch
from regard.runtime.patch import Patch
from regard.runtime.protocol import Edit, Lens, Wanted
from regard.runtime.session import Session
from regard.runtime.site import Point

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.run import Run


@dataclass(frozen=True, eq=False)
class RowPatch(Edit):
    """Patch the g-th part of the batch, of as many equal parts as there are patches, by the g-th patch.

    A batch [G * B, ...] made by repeating B sequences G times so answers G patches in one forward.

    Attributes:
        rows: a point and its value for each part; values as in `Patch`, of the shape of B sequences.

    Raises:
        NoSuchSite: when a session is made, for a point that the model does not have.
        ShapeMismatch: when run, for a batch that the number of patches does not divide.
    """

    rows: Sequence[tuple[Point, Any]]

    def check(self, anatomy: Anatomy) -> None:
        if not self.rows:
            raise RegardError("RowPatch needs at least one (Point, value).")
        for point, value in self.rows:
            Patch({point: value}).check(anatomy)

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return dict.fromkeys(point for point, _ in self.rows if point.kind != "head")

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor:
        out = x.clone()
        for part, (where, value) in zip(self._parts(x), self.rows, strict=True):
            if where == point:
                new = Patch({where: value}).hidden(where, x[part], run)
                if new is not None:
                    out[part] = new
        return out

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if any(_is_here(point, call) for point, _ in self.rows) else None

    def head_outputs(self, call: Call) -> Tensor:
        x = call.head_outputs
        assert x is not None
        out = x.clone()
        for part, (where, value) in zip(self._parts(x), self.rows, strict=True):
            if _is_here(where, call):
                new = Patch({where: value}).hidden(where, x[part, where.head], call.run)
                if new is not None:
                    out[part, where.head] = new
        return out

    def _parts(self, x: Tensor) -> list[slice]:
        size, rest = divmod(x.shape[0], len(self.rows))
        if rest:
            raise ShapeMismatch(
                f"RowPatch has {len(self.rows)} patches, which do not divide a tensor of shape "
                f"{tuple(x.shape)}; repeat the sequences once for each."
            )
        return [slice(size * part, size * (part + 1)) for part in range(len(self.rows))]


def collect(model: nn.Module, inputs: Mapping[str, Any], points: Iterable[Point]) -> dict[Point, Tensor]:
    """Run a model once, without gradients, and return what is at some points, to be patched in elsewhere.

    Args:
        model: any model whose attention regard can reach.
        inputs: keyword arguments of its forward.
        points: where to look; a point may have a position.

    Returns:
        point -> tensor, in the order given: [B, T, D], for a head [B, T, Dv], at a position without T.

    Raises:
        NoSuchSite: for a point that the model does not have.
        NothingObserved: for a point that this forward never reached.

    Example:
        >>> values = collect(model, clean, [Point("head", 5, head=1)])     # doctest: +SKIP
        >>> with regard.patch(model, values):                              # doctest: +SKIP
        ...     model(**corrupt)
    """
    wanted = tuple(points)
    Patch(dict.fromkeys(wanted, 0.0)).check(_anatomy(model))
    with torch.no_grad(), Session(model, [Collected(wanted)]) as session:
        model(**uncached(model, inputs))
    found = session[Collected]
    missing = [point for point in wanted if point not in found]
    if missing:
        raise NothingObserved(f"{missing[0]} was not reached by this forward of {type(model).__name__}.")
    return {point: found[point] for point in wanted}


@dataclass(frozen=True, eq=False)
class Collected(Lens):
    """Keeps what is at some points, as the last forward left it.

    Attributes:
        wanted: where to look.
    """

    wanted: tuple[Point, ...] = field(default=())

    def fresh(self) -> Collected:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        assert isinstance(twin, Collected)
        return twin

    def result(self) -> dict[Point, Tensor]:
        return dict(self.found)  # type: ignore[attr-defined]

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return [point for point in self.wanted if point.kind != "head"]

    def hidden(self, point: Point, x: Tensor, run: Run) -> None:
        self._keep(point, x)

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if any(_is_here(point, call) for point in self.wanted) else None

    def head_outputs(self, call: Call) -> None:
        assert call.head_outputs is not None
        for point in self.wanted:
            if _is_here(point, call):
                self._keep(point, call.head_outputs[:, point.head])

    def _keep(self, point: Point, x: Tensor) -> None:
        kept = x if point.position is None else x[:, point.position]
        self.found[point] = kept.detach().clone()  # type: ignore[attr-defined]


def uncached(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of a forward that keeps no cache, where the model can keep one."""
    parameters = inspect.signature(model.forward).parameters
    return {**inputs, "use_cache": False} if _has_cache(model, parameters) else dict(inputs)


def _has_cache(model: nn.Module, parameters: Mapping[str, Any]) -> bool:
    decoder = callable(getattr(model, "can_generate", None)) and model.can_generate()  # type: ignore[operator]
    return "use_cache" in parameters or (decoder and "past_key_values" in parameters)


def _is_here(point: Point, call: Call) -> bool:
    return point.kind == "head" and call.site.named(point.layer, call.main)


def _anatomy(model: nn.Module) -> Anatomy:
    from regard.runtime.anatomy import anatomy_of, root_of

    return anatomy_of(root_of(model))
