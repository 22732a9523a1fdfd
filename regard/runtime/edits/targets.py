"""Which heads of which layers an edit is meant for, and which columns of a block they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from regard.engines.masks import unhidden
from regard.engines.rows import RowBlock
from regard.errors import NoSuchSite, RegardError

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call

Layer = int | str
HeadName = tuple[Layer, int]
Factor = float | Tensor
T = TypeVar("T")


def check_heads(heads: Iterable[Any], anatomy: Anatomy, edit: str) -> None:
    """Refuse heads that the model does not have, or that are named twice.

    Args:
        heads: `(layer, head)` pairs; a layer is a number in the main stack, or an alias.
        edit: the edit's class, for the message.

    Raises:
        NoSuchSite: naming what there is.
        RegardError: for what is no such pair, and for a head named twice.
    """
    seen = set()
    for name in heads:
        if not _is_head(name):
            raise RegardError(f"{edit} names a head by (layer, head), such as (5, 3); got {name!r}.")
        site = anatomy.check_head(*name)
        if (site.alias, name[1]) in seen:
            raise RegardError(f"{edit} names head {name[1]} of {site.alias} twice; name it once.")
        seen.add((site.alias, name[1]))


def named_layers(layers: Iterable[Layer], anatomy: Anatomy) -> list[str]:
    """Return the aliases of layers, each once, in the order given."""
    return list(dict.fromkeys(anatomy.site(layer).alias for layer in layers))


def _is_head(name: Any) -> bool:
    pair = isinstance(name, tuple) and len(name) == 2
    return pair and isinstance(name[0], int | str) and isinstance(name[1], int)


def check_layers(
    layers: Iterable[Layer] | None, heads: Sequence[int] | None, anatomy: Anatomy, edit: str
) -> None:
    """Refuse layers that the model does not have, and heads that one of them does not have.

    Raises:
        NoSuchSite: naming what there is.
        RegardError: for an empty choice, and a head named twice.
    """
    for what, given in (("layers", layers), ("heads", heads)):
        if given is not None and not list(given):
            raise RegardError(f"{edit} was given no {what}; leave {what}= out to mean all of them.")
    if heads is not None and not all(isinstance(head, int) for head in heads):
        raise RegardError(f"{edit} takes heads as numbers, the same in every layer; got {list(heads)!r}.")
    if heads is not None and len(set(heads)) < len(list(heads)):
        raise RegardError(f"{edit} names a head twice in {list(heads)!r}; name it once.")
    sites = [s for s in anatomy.sites if s.kind == anatomy.main] if layers is None else None
    for layer in [s.alias for s in sites] if sites is not None else list(layers or ()):
        anatomy.site(layer)
        for head in heads or ():
            anatomy.check_head(layer, head)


def heads_here(call: Call, heads: Iterable[HeadName]) -> list[int]:
    """Return which of `heads` are of this call's site, in the order given.

    Raises:
        NoSuchSite: where the module did not tell how many heads it has, and has fewer.
    """
    found = [head for layer, head in heads if call.site.named(layer, call.main)]
    return within(call, found)


def within(call: Call, heads: Sequence[int]) -> list[int]:
    """Return `heads` as a list, having made sure that this call has them."""
    for head in heads:
        if not 0 <= head < call.heads:
            raise NoSuchSite(f"{call.site.alias} has no head {head}; it has heads 0 to {call.heads - 1}.")
    return list(heads)


def layer_here(call: Call, layers: Iterable[Layer] | None) -> bool:
    """Whether a call is of one of `layers`; None means all of the main stack."""
    if layers is None:
        return call.site.kind == call.main
    return any(call.site.named(layer, call.main) for layer in layers)


def columns(block: RowBlock, heads: Sequence[int] | None) -> list[int] | None:
    """Return where `heads` stand in the head dimension of a block; None where all are meant.

    A block may hold more heads than one edit asked for.
    """
    if heads is None:
        return None
    if block.heads is None:
        return list(heads)
    opened = block.heads.tolist()
    return None if opened == list(heads) else [opened.index(head) for head in heads]


def pick(x: Tensor, where: list[int] | None) -> Tensor:
    """Return the heads `where` of `x` [B, H', ...]; all, and `x` itself, for None."""
    return x if where is None else x[:, where]


def put(x: Tensor, where: list[int] | None, new: Tensor) -> Tensor:
    """Return `x` with the heads `where` replaced by `new`; `x` is left as it was."""
    if where is None or where == list(range(x.shape[1])):
        return new
    index = torch.tensor(where, device=x.device)
    return x.index_copy(1, index, new.to(x.dtype))


def visible_keys(block: RowBlock) -> Tensor:
    """Return which keys each row of a block may see, bool [B|1, H'|1, R, K].

    What an additive mask hides is said by `regard.engines.masks.unhidden`.
    """
    rows = block.call.mask.rows(block.start, block.stop, block.key_start, block.key_stop)
    shape = (1, 1, block.stop - block.start, block.key_stop - block.key_start)
    if rows is None:
        return torch.ones(shape, dtype=torch.bool, device=block.call.q.device)
    rows = unhidden(rows)
    if block.heads is not None and rows.shape[1] not in (1, len(block.heads)):
        rows = rows.index_select(1, block.heads)
    return rows.expand(rows.shape[0], rows.shape[1], *shape[2:])


def check_factor(name: str, factor: Any, low: float | None = None, high: float | None = None) -> None:
    """Refuse what is neither a number in range nor a tensor of no or one dimension.

    Raises:
        RegardError: naming the option, what it was and what it should be.
    """
    if isinstance(factor, Tensor):
        if factor.ndim > 1:
            raise RegardError(f"{name} is a tensor of shape {tuple(factor.shape)}; it must be [] or [B].")
        return
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not math.isfinite(factor):
        raise RegardError(f"{name} is {factor!r}; it must be a number, finite, or a tensor [] or [B].")
    if (low is not None and factor < low) or (high is not None and factor > high):
        raise RegardError(f"{name} is {factor}; it must lie between {low} and {high}.")


def stack_factors(factors: Sequence[Factor], like: Tensor) -> Tensor:
    """Return factors, numbers or tensors [] or [B], as [B|1, n, 1, 1] in the dtype of `like` [B, ...].

    Where `like` holds several beams a sequence, a factor a sequence is repeated for its beams.
    """
    if not any(isinstance(f, Tensor) for f in factors):
        return torch.tensor(factors, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
    batch = like.shape[0]
    parts = []
    for factor in factors:
        part = torch.as_tensor(factor, device=like.device).to(like.dtype).reshape(-1)
        if part.shape[0] not in (1, batch) and batch % part.shape[0]:
            raise RegardError(f"a factor was given for {part.shape[0]} sequences, and the batch is {batch}.")
        parts.append(part if part.shape[0] == 1 else part.repeat_interleave(batch // part.shape[0]))
    wide = max(len(part) for part in parts)
    return torch.stack([part.expand(wide) for part in parts], 1)[:, :, None, None]
