"""Choose few of many: what routed mechanisms share, their controls, and what a choice keeps.

A router scores candidates (keys, blocks of keys, clusters, heads) and takes the best. No gradient flows
through a choice: scores are detached and float32. Equal scores go to the lowest index, so that a choice is
the same on every machine. Whoever wants a control passes its scores to the same functions:

    random    `random_scores`          equally likely
    nearest   `nearest_scores`         by distance from the row
    oracle    `oracle_scores`          by the weight that dense attention gives
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch

MANY = 8


def routing_scores(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale q k^T without gradient, float32, or float64 where `q` is.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, S, D]; consecutive query heads share a key head.

    Returns:
        [B, H, T, S].
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.detach().to(wide), k.detach().to(wide)
    group = q.shape[1] // max(1, k.shape[1])
    by_head = q.unflatten(1, (k.shape[1], group)).flatten(2, 3) @ k.transpose(2, 3)
    return by_head.unflatten(2, (group, -1)).flatten(1, 2).mul_(scale)


def top_mask(scores: Tensor, count: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Return which are the `count` highest of the last axis; of equal ones the lowest indices.

    Args:
        scores: [..., N]; -inf is never chosen, nor NaN.
        count: how many, or int64 that broadcasts to [...]; where fewer are valid, all of those.
        valid: bool, broadcasts with `scores`; False is never chosen.

    Returns:
        bool [..., N].

    Example:
        >>> top_mask(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
    """
    scores = _eligible(scores, valid)
    n = scores.shape[-1]
    counts = torch.as_tensor(count, device=scores.device)
    _check_count(counts)
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    counts = counts.clamp(max=n).expand(scores.shape[:-1])[..., None]
    most = int(counts.max()) if counts.numel() else 0
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(count, int):
        lowest = _lowest(scores, most)
    else:
        ranked = scores.topk(most, -1).values if most * MANY < n else scores.sort(-1, descending=True).values
        lowest = ranked.gather(-1, (counts - 1).clamp_min(0))
    chosen = scores >= lowest
    if int(chosen.sum()) != int(counts.sum()):
        above = scores > lowest
        left = counts - above.sum(-1, True)
        equal = chosen & ~above
        chosen = above | (equal & (equal.cumsum(-1) <= left))
    return chosen & (counts > 0) & (scores > -torch.inf)


def top_k(scores: Tensor, k: int, valid: Tensor | None = None, *, by_score: bool = False) -> Tensor:
    """Return the indices of the `k` highest of the last axis; of equal ones the lowest.

    Args:
        scores: [..., N]; -inf is never chosen, nor NaN.
        k: how many.
        valid: bool, broadcasts with `scores`; False is never chosen.
        by_score: whether the highest comes first; else indices ascend.

    Returns:
        int64 [..., k], with -1 at the end where fewer are valid.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 1.0, 1.0]), 2).tolist()
        [0, 1]
        >>> top_k(torch.tensor([1.0, 3.0]), 3, by_score=True).tolist()
        [1, 0, -1]
    """
    if k < 0:
        _check_count(torch.tensor(k))
    scores = _eligible(scores, valid)
    n, take = scores.shape[-1], min(k, scores.shape[-1])
    if by_score:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        found = order[..., :take].masked_fill(ranked[..., :take] == -torch.inf, -1)
    else:
        unequal = _unequal(scores, take)
        if unequal is not None:
            return torch.nn.functional.pad(unequal, (0, k - take), value=-1) if k > take else unequal
        chosen = top_mask(scores, take)
        places = torch.where(chosen, torch.arange(n, device=scores.device), n)
        found = places.topk(take, -1, largest=False).values if take * MANY < n else places.sort(-1).values
        found = found[..., :take]
        found = torch.where(found < n, found, -1)
    return torch.nn.functional.pad(found, (0, k - take), value=-1)


def _lowest(scores: Tensor, take: int) -> Tensor:
    """The `take`-th highest of the last axis, [..., 1]."""
    at = scores.shape[-1] - take
    if scores.device.type == "cpu":  # where numpy is several times faster
        return torch.from_numpy(np.partition(scores.numpy(), at, -1)[..., at : at + 1])
    return scores.kthvalue(at + 1, keepdim=True).values


def _unequal(scores: Tensor, take: int) -> Tensor | None:
    """Return the places of the `take` highest, ascending, where none is as high as the next or -inf."""
    if not take or not scores.numel():
        return None
    lowest = _lowest(scores, take)
    chosen = scores >= lowest
    rows = lowest.numel()
    if int(chosen.sum()) != take * rows or bool((lowest == -torch.inf).any()):
        return None
    places = chosen.flatten().nonzero().view(*scores.shape[:-1], take)
    first = torch.arange(0, rows * scores.shape[-1], scores.shape[-1], device=scores.device)
    return places - first.view(lowest.shape)


def random_scores(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return scores by which every choice is equally likely, float32 of `shape`."""
    return torch.rand(shape, generator=generator, device=generator.device)


def nearest_scores(rows: Tensor, candidates: Tensor) -> Tensor:
    """Return scores that are higher the nearer a candidate is to a row.

    Args:
        rows: positions [..., T].
        candidates: positions [..., N], of blocks for example those of their middles.

    Returns:
        float32 [..., T, N].
    """
    return -(rows[..., :, None] - candidates[..., None, :]).abs().float()


def oracle_scores(weights: Tensor, key_block: int = 1) -> Tensor:
    """Return scores that a router would need to keep the most: the weight that dense attention gives.

    Args:
        weights: dense attention, [..., T, S].
        key_block: keys in a candidate; the last may be short.

    Returns:
        float32, or float64 where `weights` is, [..., T, blocks].
    """
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    spare = -weights.shape[-1] % key_block
    whole = torch.nn.functional.pad(weights.detach().to(wide), (0, spare))
    return whole.unflatten(-1, (-1, key_block)).sum(-1)


def kept_mass(weights: Tensor, chosen: Tensor) -> Tensor:
    """Return the share of dense attention that falls on what was chosen, [..., T]; 1 of nothing.

    Args:
        weights: dense attention, [..., T, S].
        chosen: bool, broadcasts with `weights`.
    """
    whole = weights.sum(-1)
    kept = (weights * chosen).sum(-1)
    return torch.where(whole > 0, kept / torch.where(whole > 0, whole, 1.0), 1.0)


def recall(scores: Tensor, chosen: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Return the share of the `k` highest-scored that were chosen, [..., T]; 1 where none is valid.

    Args:
        scores: [..., T, S], for example dense weights.
        chosen: bool, broadcasts with `scores`.
        valid: bool, broadcasts with `scores`; where fewer than `k` are valid, of those.
    """
    best = top_mask(scores, k, valid)
    count = best.sum(-1)
    found = (best & chosen).sum(-1)
    return torch.where(count > 0, found / count.clamp_min(1), 1.0)


def coverage(chosen: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the share of candidates that at least one row chose, [...].

    Args:
        chosen: bool [..., T, N].
        valid: bool, broadcasts with `chosen`: which candidates a row could choose; default all.
    """
    possible = torch.ones_like(chosen) if valid is None else valid.expand_as(chosen)
    possible_for_any = possible.any(-2)
    found = (chosen & possible).any(-2).sum(-1)
    return found / possible_for_any.sum(-1).clamp_min(1)


def _eligible(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Detached scores, -inf where they must not be chosen."""
    if not scores.ndim or not scores.is_floating_point():
        kind = str(scores.dtype).removeprefix("torch.")
        raise ShapeMismatch(f"scores are {kind} {list(scores.shape)}; they must be floating-point [..., N].")
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    hidden = scores.isnan() if valid is None else scores.isnan() | ~valid
    return scores.masked_fill(hidden, -torch.inf)


def _check_count(count: Tensor) -> None:
    if count.numel() and bool((count < 0).any()):
        raise RegardError(f"{int(count.min())} were to be chosen; it must be a number from 0.")
