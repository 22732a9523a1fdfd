"""Replace the tensors at points of a model: activation patching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.errors import NoSuchSite, RegardError, ShapeMismatch
from regard.runtime.protocol import Edit, Wanted
from regard.runtime.site import POINT_KINDS, Point

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call
    from regard.runtime.run import Run

Value = Tensor | float | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """Replace what is at some points; the edit behind `regard.patch`.

    Attributes:
        values: point -> a tensor that broadcasts to the point's shape (at a position: [B, D], without
            time), a number, or a function of the old tensor that returns the new one of the same shape.

    A position is an array index into what is fed in one forward. In `generate()` a patch at a position
    therefore applies to the prefill only; one without a position applies at every step.
    """

    values: Mapping[Point, Any]

    def check(self, anatomy: Anatomy) -> None:
        """Refuse points that the model does not have.

        Raises:
            NoSuchSite: naming what there is.
            RegardError: for what is no mapping from points, or empty.
        """
        if not isinstance(self.values, Mapping) or not self.values:
            raise RegardError("patch needs a mapping from at least one Point to its value.")
        for point in self.values:
            if not isinstance(point, Point):
                raise RegardError(f"patch takes Points, and got {point!r}.")
            if point.kind == "head":
                if point.layer is None or point.head is None:
                    raise NoSuchSite(f"{point} needs a layer and a head.")
                anatomy.check_head(point.layer, point.head)
            elif point.kind not in POINT_KINDS or point.head is not None:
                raise NoSuchSite(f"{point}: points are {', '.join(POINT_KINDS)}; only 'head' has a head.")
            else:
                anatomy.place(point)

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers of all points."""
        layers = (point.layer for point in self.values if point.layer is not None)
        return list(dict.fromkeys(anatomy.site(layer).alias for layer in layers))

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return [point for point in self.values if point.kind != "head"]

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor | None:
        return self._at(point, x, run)

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if any(True for _ in self._heads(call)) else None

    def head_outputs(self, call: Call) -> Tensor:
        out = call.head_outputs
        assert out is not None
        for point in self._heads(call):
            assert point.head is not None
            new = self._at(point, out[:, point.head], call.run)
            if new is not None:
                before, after = out[:, : point.head], out[:, point.head + 1 :]
                out = torch.cat([before, new[:, None], after], 1)
        return out

    def _heads(self, call: Call) -> Iterable[Point]:
        for point in self.values:
            if point.kind == "head" and call.site.named(point.layer, call.main):
                yield point

    def _at(self, point: Point, x: Tensor, run: Run) -> Tensor | None:
        value = self.values[point]
        if point.position is None:
            return _value(point, value, x)
        if run.phase == "decode":
            return None
        if x.ndim != 3:
            raise ShapeMismatch(
                f"{point}: a tensor of shape {tuple(x.shape)} has no positions to choose from."
            )
        length = x.shape[1]
        if not -length <= point.position < length:
            raise NoSuchSite(f"{point}: this forward has {length} positions.")
        position = point.position % length
        new = _value(point, value, x[:, position])
        return torch.cat([x[:, :position], new[:, None], x[:, position + 1 :]], 1)


def _value(point: Point, value: Any, old: Tensor) -> Tensor:
    new = value(old) if callable(value) else value
    if not isinstance(new, Tensor | float | int):
        raise RegardError(f"{point} is to be a tensor or a number, and the value is {type(new).__name__}.")
    new = torch.as_tensor(new, device=old.device).to(old.dtype)
    try:
        return new.expand_as(old)
    except RuntimeError:
        raise ShapeMismatch(
            f"{point} holds a tensor of shape {tuple(old.shape)}, and the value has shape {tuple(new.shape)}."
        ) from None
