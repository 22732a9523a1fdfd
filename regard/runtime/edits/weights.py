"""Rewrite attention weights after the softmax, by any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.edits import targets
from regard.runtime.edits.targets import Layer
from regard.runtime.protocol import Edit, Wanted

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call


@dataclass(frozen=True, kw_only=True, eq=False)
class EditWeights(Edit):
    """Replace the weights of chosen heads by `fn(weights, block)`.

    The function sees a block of query rows at a time and must treat each row by itself;
    `check_row_local` finds out whether it does. Which rows and keys these are say
    `block.query_positions` [B|1, R], `block.key_positions` [B|1, K], `block.valid_rows` and
    `block.run.spans`; `block.site` says which layer.

    Attributes:
        fn: takes float32 weights [B, H', R, K], of the chosen heads in the order given, and the
            `RowBlock`; returns new ones of the same shape. It must not write into its argument.
        layers: numbers in the main stack, or aliases; default all of the main stack.
        heads: query heads, the same in every layer; default all.

    Raises:
        NoSuchSite: when a session is made, for a layer or head that is not there.
        ShapeMismatch: when run, for a result of another shape.
    """

    fn: Callable[[Tensor, RowBlock], Tensor] = field(kw_only=False)
    layers: Sequence[Layer] | None = field(default=None, kw_only=False)
    heads: Sequence[int] | None = field(default=None, kw_only=False)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise RegardError(f"fn is {self.fn!r}; it must be a function of (weights, block).")

    def check(self, anatomy: Anatomy) -> None:
        """Refuse layers and heads that the model does not have."""
        targets.check_layers(self.layers, self.heads, anatomy, "EditWeights")

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of `layers`."""
        return targets.named_layers(self.layers or (), anatomy)

    def wants(self, call: Call) -> Wanted | None:
        if not targets.layer_here(call, self.layers):
            return None
        return Wanted(heads=None if self.heads is None else targets.within(call, self.heads))

    def weights(self, block: RowBlock) -> Tensor:
        where = targets.columns(block, self.heads)
        old = targets.pick(block.weights, where)
        new = self.fn(old, block)
        if not isinstance(new, Tensor) or new.shape != old.shape:
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ShapeMismatch(
                f"EditWeights' function was given weights of shape {tuple(old.shape)} at {block.site.alias} "
                f"and returned {found}; it must return the same shape."
            )
        return targets.put(block.weights, where, new)
