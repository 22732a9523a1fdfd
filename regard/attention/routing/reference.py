"""Routing by definition: one sequence, head and cluster at a time, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attention.routing.clusters import normalized
from regard.attention.routing.options import Options


def routed_weights(
    q: Tensor, k: Tensor, centroids: Tensor, options: Options, scale: float, *, causal: bool, offset: int
) -> Tensor:
    """Return the weights of one head and sequence without padding, [T, S].

    Args:
        q: [T, D], k [S, D]; query i stands at key i + `offset`.
        centroids: [C, D].
    """
    x, y = normalized(q, options.norm), normalized(k, options.norm)
    mu = centroids.to(x)
    with torch.no_grad():
        near_q, near_k = x @ mu.T, y @ mu.T
    scores = (x @ y.T if options.norm == "layernorm" else q.to(x) @ k.to(x).T) * scale
    if options.selection == "topw":
        return _balanced(scores, near_q, near_k, options, causal, offset)
    return _recent(scores, near_q, near_k, options, offset)


def _balanced(
    scores: Tensor, near_q: Tensor, near_k: Tensor, options: Options, causal: bool, offset: int
) -> Tensor:
    whole, count = torch.zeros_like(scores), [0] * len(scores)
    for c in range(options.clusters):
        rows, keys = (_best(near[:, c], options.cluster_size) for near in (near_q, near_k))
        for i in rows:
            count[i] += 1
            seen = [j for j in keys if not causal or j <= i + offset]
            seen = _unmasked(seen, i + offset, options)
            whole = whole.index_put((torch.tensor(i), _places(seen)), _softmax(scores, i, seen), True)
    over = [n + options.damping if n else 1.0 for n in count]
    return whole / torch.tensor(over, dtype=whole.dtype)[:, None]


def _recent(scores: Tensor, near_q: Tensor, near_k: Tensor, options: Options, offset: int) -> Tensor:
    of_rows, of_keys = ([_best(row, options.nearest) for row in near.tolist()] for near in (near_q, near_k))
    whole = torch.zeros_like(scores)
    for i, own in enumerate(of_rows):
        seen: set[int] = set()
        for c in own:
            members = [j for j in range(i + offset + 1) if c in of_keys[j]]
            seen |= set(members[-options.cluster_size :])
        listed = _unmasked(sorted(seen), i + offset, options)
        whole = whole.index_put((torch.tensor(i), _places(listed)), _softmax(scores, i, listed), True)
    return whole


def _best(near: Tensor | list[float], count: int) -> list[int]:
    values = [float(x) for x in near]
    return sorted(sorted(range(len(values)), key=lambda n: (-values[n], n))[:count])


def _unmasked(seen: list[int], own: int, options: Options) -> list[int]:
    other = [j for j in seen if j != own]
    return other if options.mask_self and other else seen


def _softmax(scores: Tensor, i: int, seen: list[int]) -> Tensor:
    return scores[i, _places(seen)].softmax(-1)


def _places(seen: list[int]) -> Tensor:
    return torch.tensor(seen, dtype=torch.int64)
