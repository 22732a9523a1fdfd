"""What a block is: a mechanism that mixes positions of a layer's input without queries, keys and values.

A block on a plane may also show what it weights its positions with, for looking at: one map a head (`maps`),
or, where it has queries, a row of weights for each of them (`rows`). `regard.watch` reads these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch

BLOCK_LAWS = ("reference", "gradient", "causal", "batch", "precision", "shown")
MAP_KINDS = {
    "probability": "weights of 0 and more that sum to 1 over the positions",
    "factor": "factors of 0 and more on the features of each position; 1 leaves them as they are",
    "gate": "factors of either sign, without bound, on the features of each position; not probabilities",
}
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Maps:
    """What a block weights the positions of a plane with, one map a head.

    Attributes:
        values: floating-point [B, heads, H, W], as the block uses them, row 0 at the top. Padding that a
            block adds by itself is cut.
        kind: "probability", "factor" or "gate"; `MAP_KINDS` says what each is.
        head: what has a map of its own, in the singular: "head", "channel", "group".

    Raises:
        ShapeMismatch: where values are not [B, heads, H, W].
        RegardError: for another kind.

    Example:
        >>> Maps(torch.full((2, 3, 4, 5), 1 / 20), "probability").values.shape
        torch.Size([2, 3, 4, 5])
    """

    values: Tensor
    kind: str
    head: str = "head"

    def __post_init__(self) -> None:
        if self.values.ndim != 4 or not self.values.is_floating_point() or not self.values.numel():
            raise ShapeMismatch(
                f"values must be floating-point [batch, heads, height, width], and are {self.values.dtype} "
                f"{list(self.values.shape)}."
            )
        if self.kind not in MAP_KINDS:
            raise RegardError(f"kind is {self.kind!r}; it must be one of {', '.join(MAP_KINDS)}.")


class Block(nn.Module):
    """A module from x to a tensor of the same batch, with a definition and a fast path.

        reference(x)   the definition, from the paper, no tricks
        forward(x)     the same, fast

    and of those that can be looked at on a plane, as `shows` says, either of

        maps(x)           one map a head over the positions of x, [B, heads, H, W], and of what kind
        rows(x, queries)  attention weights of chosen queries over the keys, [B, heads, Q, H W]; `grids(x)`
                          says where on the plane queries and keys are

    Both are for looking: they compute the weights anew from x and may take more time than `forward`.

    Attributes:
        causal: whether no later position moves an earlier one; time is then dimension 1 of x and the output.
        exempt: laws that it breaks by design, and why; `BLOCK_LAWS` names them.
        shows: "maps" or "rows", or None where there is nothing to show on a plane.
        used: height and width of the part of its plane that is the image, where the module around the block
            has padded x at the bottom and right; None for all. Lenses see this part.
    """

    causal: ClassVar[bool] = False
    exempt: ClassVar[dict[str, str]] = {}
    shows: Literal["maps", "rows"] | None = None
    used: Grid | None = None

    def reference(self, x: Tensor) -> Tensor:
        """Return what `forward` must return, by definition."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def example(self, generator: torch.Generator) -> Tensor:
        """Return an input that the shared laws may try, float64, of two items."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> Maps:
        """Return what the positions of x are weighted with, where `shows` is "maps".

        A block whose every channel has a weight of its own has as many heads as channels.

        Args:
            x: what `forward` takes.
        """
        raise RegardError(f"{type(self).__name__} has no map of its positions{self._instead('rows')}.")

    def rows(self, x: Tensor, queries: Tensor | Sequence[int]) -> Tensor:
        """Return the attention weights of chosen queries, [B, heads, Q, H W], where `shows` is "rows".

        Keys that a query does not see have weight 0. A row sums to 1, or to less where part of its weight
        goes to keys that are no position of the plane, such as unmasked padding.

        Args:
            x: what `forward` takes.
            queries: int64 [Q], positions on the plane of the queries, row by row from the top: y W + x.
        """
        raise RegardError(f"{type(self).__name__} has no rows of weights{self._instead('maps')}.")

    def grids(self, x: Tensor) -> tuple[Grid, Grid]:
        """Return height and width of the plane of the queries, and of that of the keys, for `rows`."""
        raise RegardError(f"{type(self).__name__} has no queries and keys on a plane.")

    def _instead(self, name: str) -> str:
        return f"; use {name}()" if self.shows == name else ""


def chosen_queries(queries: Tensor | Sequence[int], grid: Grid) -> Tensor:
    """Return positions of queries as int64 [Q].

    Raises:
        RegardError: where they are not whole numbers on the plane.

    Example:
        >>> chosen_queries([0, 11], (3, 4))
        tensor([ 0, 11])
    """
    found = torch.as_tensor(queries)
    count = grid[0] * grid[1]
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool or not len(found):
        raise RegardError(f"queries must be whole numbers [Q], and are {found.dtype} {list(found.shape)}.")
    if int(found.min()) < 0 or int(found.max()) >= count:
        raise RegardError(
            f"queries go from {int(found.min())} to {int(found.max())}; on a plane of {grid[0]} x {grid[1]} "
            f"they must be from 0 to {count - 1}."
        )
    return found.long()
