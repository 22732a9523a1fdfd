"""Add a vector to the residual stream, at all positions, or from some position on.

    x_t <- x_t + alpha s        t in scope, after block `layer`

Source: Khayatan et al., 2025, arXiv 2501.03012, section 5. Status: agrees with the official code with a
cache; without one that takes every forward for a prompt, and here positions count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from regard.edit.registry import edit
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.protocol import Edit
from regard.runtime.site import Point

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.run import Run

Scope = Literal["all", "generated", "last", "from"]


@edit("add-vector")
@dataclass(frozen=True, kw_only=True, eq=False)
class AddVector(Edit):
    """Steer by a vector.

    Attributes:
        vector: [D], of any float dtype; cast to that of the residual stream.
        layer: number of the block after which it is added, or an alias.
        alpha: by how much; negative steers the other way.
        scope: `all` tokens, of the prompt and generated; `generated` alone; `last`, the last token of the
            prompt and all generated; `from`, tokens from `start` on. Padding is never steered.
        start: the first token that is steered, of those that are no padding; with `scope="from"` alone.

    Raises:
        RegardError: on creation, for an alpha or vector that is not finite, an unknown scope, or a start
            without its scope.
        ShapeMismatch: for a vector of another shape; when run, of another width than the model's.
        NoSuchSite: when a session is made, for a layer that is not there.

    Example:
        >>> edit = AddVector(vector=torch.zeros(8), layer=3, alpha=2.0, scope="last")
        >>> edit.scope
        'last'
    """

    vector: Tensor | Sequence[float]
    layer: int | str
    alpha: float = 1.0
    scope: Scope = "all"
    start: int | None = None

    def __post_init__(self) -> None:
        vector = torch.as_tensor(
            self.vector, dtype=None if isinstance(self.vector, Tensor) else torch.float32
        )
        if vector.ndim != 1 or not len(vector) or not vector.is_floating_point():
            raise ShapeMismatch(f"vector is {list(vector.shape)}; it must be numbers [D].")
        if not math.isfinite(self.alpha) or not bool(torch.isfinite(vector).all()):
            raise RegardError(f"alpha is {self.alpha}; it and the vector must be finite.")
        if self.scope not in get_args(Scope):
            raise RegardError(f"scope is {self.scope!r}; it must be one of {', '.join(get_args(Scope))}.")
        if (self.start is not None) != (self.scope == "from") or (self.start or 0) < 0:
            raise RegardError(
                f"scope is {self.scope!r} and start {self.start}; scope='from' takes a start from 0, alone."
            )
        object.__setattr__(self, "vector", vector.detach())

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a layer that the model does not have."""
        anatomy.block(self.layer)

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the alias of the layer."""
        return [anatomy.site(self.layer).alias]

    def wants(self, call: Any) -> None:
        return None

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        return [Point("residual", self.layer)]

    def hidden(self, point: Point, x: Tensor, run: Run) -> Tensor:
        vector = self.vector
        assert isinstance(vector, Tensor)
        if vector.shape[0] != x.shape[-1]:
            raise ShapeMismatch(
                f"vector has {vector.shape[0]} numbers, and the stream is {x.shape[-1]} wide."
            )
        added = self.alpha * vector.to(x)
        where = self._where(x, run)
        return x + (added if where is None else where[..., None] * added)

    def _where(self, x: Tensor, run: Run) -> Tensor | None:
        """Which positions of x [B, T, D] are steered, bool [B|1, T]; None for all."""
        rows, length = x.shape[:2]
        valid = run.valid_rows(length)
        valid = None if valid is None or valid.shape[0] != rows else valid.to(x.device)
        if self.scope == "all":
            return valid
        if valid is None:
            place = (run.seen or 0) + torch.arange(length, device=x.device).expand(rows, length)
        else:
            assert run.valid is not None
            place = (run.valid.cumsum(1) - 1)[:, -length:].to(x.device)
        if self.scope == "from":
            chosen = place >= (self.start or 0)
        else:
            chosen = place >= self._ends(place, run)[:, None] - int(self.scope == "last")
        return chosen if valid is None else chosen & valid

    def _ends(self, place: Tensor, run: Run) -> Tensor:
        """How many tokens the prompt of each row has, [B]; 0 where a loop of one's own decodes."""
        ends = place.amax(1) + 1 - run.appended
        return torch.zeros_like(ends) if run.phase == "decode" and not run.grows else ends
