"""Force attention: chosen rows of chosen heads look where they are told, after the softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from regard.engines.rows import RowBlock
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.edits import targets
from regard.runtime.edits.targets import Factor, HeadName
from regard.runtime.head_list import check_made_for
from regard.runtime.protocol import Edit, Wanted
from regard.runtime.session import Session

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call

Named = Literal["first", "self", "previous"]
NAMED = get_args(Named)


@dataclass(frozen=True, kw_only=True, eq=False)
class ForceAttention(Edit):
    """Make heads look at chosen keys: w' = (1 - strength) * w + strength * target.

    `target` is 1 on the chosen key, spread evenly over several, or a distribution that is given. What it puts
    on keys that a row may not see goes to the others; a row that may not see any of them, such as a token
    before the chosen one, is left as it was. Positions are absolute: the first real token is 0, whatever the
    padding. Values stay those of the model, and only rows of the named query heads change, also where several
    share keys.

    Attributes:
        heads: `(layer, head)` pairs; a layer is a number in the main stack, or an alias. Or a `HeadList`.
        to: a position; `first`, `self` or `previous`; positions to share, int64 [n], or [B, n] for others in
            each sequence; position -> weight, of sum 1; or a function of the `RowBlock` that returns
            positions, int64 [B|1, R], the keys to share, bool [B|1, R, K], or weights, float [B|1, R, K].
        rows: which query positions to force: one, several, or int64 [B, n] for others in each sequence;
            default all. Tokens that `generate()` appends have positions of their own.
        strength: 0 to 1, or a tensor [] or [B]; gradients reach it.

    Raises:
        RegardError: for a negative position, weights that are no distribution, a strength out of range, or
            `self` and `previous` in cross-attention, where queries and keys are different sequences.
        NoSuchSite: when a session is made, for a layer or head that is not there.

    Example:
        >>> edit = ForceAttention([(5, 3)], to="previous", strength=0.5)
    """

    heads: Sequence[HeadName] = field(kw_only=False)
    to: int | Named | Tensor | Mapping[int, float] | Callable[[RowBlock], Tensor]
    rows: int | Sequence[int] | Tensor | None = None
    strength: Factor = 1.0

    def __post_init__(self) -> None:
        if not list(self.heads):
            raise RegardError("ForceAttention needs at least one (layer, head).")
        if isinstance(self.to, Tensor):
            _check_positions("to", self.to)
        elif isinstance(self.to, Mapping):
            _check_distribution(self.to)
        elif not _is_target(self.to):
            raise RegardError(
                f"to is {self.to!r}; it must be a position from 0 on, one of {', '.join(NAMED)}, a tensor of "
                "positions, a mapping from position to weight, or a function."
            )
        if self.rows is not None:
            _check_positions("rows", torch.as_tensor(self.rows))
        targets.check_factor("strength", self.strength, 0.0, 1.0)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads that the model does not have, and relative targets in cross-attention."""
        check_made_for(self.heads, anatomy)
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
        target = visible * self._target(block)[:, None]
        total = target.sum(-1, keepdim=True)
        target = target / torch.where(total > 0, total, 1.0)
        strength = targets.stack_factors([self.strength], old)
        forced = (total > 0) & self._forced(block)[:, None, :, None]
        new = torch.where(forced, (1 - strength) * old + strength * target, old)
        return targets.put(block.weights, where, new)

    def _forced(self, block: RowBlock) -> Tensor:
        """Which rows are forced, bool [B|1, R]."""
        rows = block.query_positions
        if self.rows is None:
            return torch.ones_like(rows, dtype=torch.bool)
        wanted = _each(torch.as_tensor(self.rows).to(rows.device), block)
        return (rows[:, :, None] == wanted[:, None, :]).any(-1)

    def _target(self, block: RowBlock) -> Tensor:
        """The weights that rows are to have, up to a factor, float32 or bool [B|1, R, K]."""
        rows, keys = block.query_positions, block.key_positions
        if isinstance(self.to, Mapping):
            places = torch.tensor(list(self.to), device=keys.device)
            shares = torch.tensor(list(self.to.values()), device=keys.device, dtype=torch.float32)
            return self._real(block, (keys[:, :, None] == places).float() @ shares)[:, None]
        if isinstance(self.to, Tensor):
            wanted = _each(self.to.to(keys.device), block)
            return self._real(block, (keys[:, :, None] == wanted[:, None, :]).any(-1))[:, None]
        if callable(self.to):
            chosen = _fitting(self.to(block), block)
            if chosen.ndim == 3:
                return chosen
        elif isinstance(self.to, int):
            chosen = torch.full_like(rows, self.to)
        else:
            chosen = {"first": torch.zeros_like(rows), "self": rows, "previous": rows - 1}[self.to]
        keys = keys[:, None, :]
        found = (keys == chosen[:, :, None]) & (keys >= 0)
        return found if block.valid_keys is None else found & block.valid_keys[:, None, :]

    def _real(self, block: RowBlock, target: Tensor) -> Tensor:
        """A target [B|1, K] without the padding."""
        return target if block.valid_keys is None else target * block.valid_keys


def _is_target(to: object) -> bool:
    if isinstance(to, bool) or (isinstance(to, int) and to < 0):
        return False
    return callable(to) or isinstance(to, int) or to in NAMED


def _check_positions(name: str, given: Tensor) -> None:
    if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 2 or not given.numel():
        raise RegardError(f"{name} is {given.dtype} {list(given.shape)}; positions are int64 [n] or [B, n].")
    if int(given.min()) < 0:
        raise RegardError(f"{name} has position {int(given.min())}; positions count from 0, the first token.")


def _check_distribution(to: Mapping[int, float]) -> None:
    total = sum(to.values())
    if not to or min(to) < 0 or min(to.values()) < 0 or abs(total - 1) > 1e-3:
        raise RegardError(
            f"to is {dict(to)}; it must map positions from 0 on to weights of sum 1, none below 0."
        )


def _each(given: Tensor, block: RowBlock) -> Tensor:
    """Positions [n] or [B, n] as [B|1, n], those of a sequence repeated for its beams."""
    found = given.reshape(1, -1) if given.ndim < 2 else given
    batch = block.weights.shape[0]
    if batch % len(found):
        raise RegardError(f"positions were given for {len(found)} sequences, and the batch is {batch}.")
    return found if len(found) == 1 else found.repeat_interleave(batch // len(found), 0)


def _fitting(chosen: Tensor, block: RowBlock) -> Tensor:
    """Refuse what is neither positions [B|1, R] nor keys or weights [B|1, R, K] of a block."""
    rows, keys = block.stop - block.start, block.key_stop - block.key_start
    if isinstance(chosen, Tensor):
        by_key = chosen.dtype == torch.bool or chosen.is_floating_point()
        wanted = (rows, keys) if by_key else (rows,)
        if chosen.shape[1:] == wanted and chosen.shape[0] in (1, block.weights.shape[0]):
            return chosen
    raise ShapeMismatch(
        f"ForceAttention's function returns int64 positions [B|1, {rows}], or bool keys or float weights "
        f"[B|1, {rows}, {keys}] here, not "
        f"{tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__}."
    )


Forced = Mapping[int, Mapping[int, float]] | tuple[Tensor, Tensor]


def force_attention(
    model: nn.Module, patterns: Mapping[HeadName, Forced], *, strength: Factor = 1.0
) -> Session:
    """Make chosen rows of chosen heads attend as they are told, inside a `with` block.

    Source: the intervention of Merullo et al., 2024, arXiv 2310.08744, section 5: the row of the last token
    is replaced after the softmax. Status: agrees with its description.

    Args:
        model: any model whose attention regard can reach.
        patterns: (layer, head) -> row -> position -> weight, positions of tokens from 0 on; or, for others in
            each sequence of a batch, -> (rows int64 [B, n], positions to share evenly int64 [B, m]).
        strength: 1 replaces the row, less mixes it with what was there.

    Returns:
        A session; also for `generate()`, whose new tokens are rows of their own.

    Raises:
        RegardError: for no heads or rows, and for weights that are no distribution.
        NoSuchSite: for a layer or head that is not there.

    Example:
        >>> with force_attention(model, {(20, 0): {13: {4: 0.5, 9: 0.5}}}):     # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    edits = []
    for head, forced in patterns.items():
        if isinstance(forced, tuple):
            edits.append(ForceAttention([head], to=forced[1], rows=forced[0], strength=strength))
        else:
            edits += [
                ForceAttention([head], to=to, rows=row, strength=strength) for row, to in forced.items()
            ]
    if not edits:
        raise RegardError("patterns is empty; force one row of one head at least.")
    return Session(model, edits)
