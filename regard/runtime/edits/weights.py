"""Rewrite attention weights after the softmax: by any function, or towards one key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.edits import targets
from regard.runtime.edits.targets import Factor, HeadName, Layer
from regard.runtime.protocol import Edit, Wanted

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call

Named = Literal["first", "self", "previous"]
NAMED = get_args(Named)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class ForceAttention(Edit):
    """Make heads look at chosen keys: w' = (1 - strength) * w + strength * target.

    `target` is 1 on the chosen key, or spread evenly over several. A row that may not see any of them,
    such as a token before the chosen one, is left as it was. Positions are absolute: the first real
    token is 0, whatever the padding.

    Attributes:
        heads: `(layer, head)` pairs; a layer is a number in the main stack, or an alias.
        to: a position; `first`, `self` or `previous`; or a function of the `RowBlock` that returns
            either positions, int64 [B|1, R], or the keys to share, bool [B|1, R, K].
        strength: 0 to 1, or a tensor [] or [B]; gradients reach it.

    Raises:
        RegardError: for a negative position, a strength out of range, or `self` and `previous` in
            cross-attention, where queries and keys are different sequences.
        NoSuchSite: when a session is made, for a layer or head that is not there.

    Example:
        >>> edit = ForceAttention([(5, 3)], to="previous", strength=0.5)
    """

    heads: Sequence[HeadName] = field(kw_only=False)
    to: int | Named | Callable[[RowBlock], Tensor]
    strength: Factor = 1.0

    def __post_init__(self) -> None:
        if not list(self.heads):
            raise RegardError("ForceAttention needs at least one (layer, head).")
        known = callable(self.to) or self.to in NAMED or isinstance(self.to, int)
        if not known or isinstance(self.to, bool) or (isinstance(self.to, int) and self.to < 0):
            raise RegardError(
                f"to is {self.to!r}; it must be a position from 0 on, one of {', '.join(NAMED)}, or a "
                "function."
            )
        targets.check_factor("strength", self.strength, 0.0, 1.0)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads that the model does not have, and relative targets in cross-attention."""
        targets.check_heads(self.heads, anatomy, "ForceAttention")
        for layer, _ in self.heads:
            site = anatomy.site(layer)
            if site.cross and self.to in ("self", "previous"):
                raise RegardError(
                    f"{site.alias} attends to another sequence, so to={self.to!r} names no key."
                )

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers whose heads are forced."""
        return targets.named_layers((layer for layer, _ in self.heads), anatomy)

    def wants(self, call: Call) -> Wanted | None:
        heads = targets.heads_here(call, self.heads)
        idle = not isinstance(self.strength, Tensor) and self.strength == 0
        return Wanted(heads=() if idle else heads) if heads else None

    def weights(self, block: RowBlock) -> Tensor:
        where = targets.columns(block, targets.heads_here(block.call, self.heads))
        old = targets.pick(block.weights, where)
        visible = targets.visible_keys(block)
        visible = visible if visible.shape[1] == 1 else targets.pick(visible, where)
        reach = visible & self._chosen(block)[:, None]
        count = reach.sum(-1, keepdim=True)
        target = reach / count.clamp_min(1)
        strength = targets.stack_factors([self.strength], old)
        new = torch.where(count > 0, (1 - strength) * old + strength * target, old)
        return targets.put(block.weights, where, new)

    def _chosen(self, block: RowBlock) -> Tensor:
        """Which keys the rows are to look at, bool [B|1, R, K]."""
        rows = block.query_positions
        if callable(self.to):
            chosen = _fitting(self.to(block), block)
            if chosen.dtype == torch.bool:
                return chosen
        elif isinstance(self.to, int):
            chosen = torch.full_like(rows, self.to)
        else:
            chosen = {"first": torch.zeros_like(rows), "self": rows, "previous": rows - 1}[self.to]
        keys = block.key_positions[:, None, :]
        found = (keys == chosen[:, :, None]) & (keys >= 0)
        return found if block.valid_keys is None else found & block.valid_keys[:, None, :]


def _fitting(chosen: Tensor, block: RowBlock) -> Tensor:
    """Refuse what is neither positions [B|1, R] nor keys [B|1, R, K] of a block."""
    rows, keys = block.stop - block.start, block.key_stop - block.key_start
    if isinstance(chosen, Tensor) and not chosen.is_floating_point():
        wanted = (rows, keys) if chosen.dtype == torch.bool else (rows,)
        if chosen.shape[1:] == wanted and chosen.shape[0] in (1, block.weights.shape[0]):
            return chosen
    raise ShapeMismatch(
        f"ForceAttention's function returns int64 positions [B|1, {rows}] or bool keys [B|1, {rows}, {keys}] "
        f"here, not {tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__}."
    )
