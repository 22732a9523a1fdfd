"""Balanced clusters: each centroid takes the w queries, and the w keys, that are most like it.

    rows(c) = the w queries of highest q_i . mu_c;   keys(c) = the w keys of highest k_j . mu_c
    y_ic  = softmax over j in keys(c), j <= i, of (scale q_i . k_j), times v_j         i in rows(c)
    out_i = sum over c with i in rows(c) of y_ic / (their number + damping)

A token may be in several clusters or in none, and then its output is 0. A later token can push an earlier one
out of a cluster, so that causal order does not hold: an earlier output depends on later inputs.

Source: Roy et al., 2020, arXiv 2003.05997, algorithm 1. Differs from the official code, which masks by rank
in the lists: here by position, which is the same where the lists of queries and keys are.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from regard.attention.layout import Layout
from regard.attention.routing.options import Options
from regard.attention.select import top_k
from regard.engines.block_tiles import Visible
from regard.engines.blocks import attend_blocks

ENOUGH = 0.5


def members(affinity: Tensor, count: int, seen: Tensor) -> Tensor:
    """Return the tokens of each cluster in order of time, int64 [B, H, C, min(count, N)], -1 for none.

    Args:
        affinity: [B, H, C, N].
        seen: int64 [B|1], how many of the N are real.
    """
    n = affinity.shape[3]
    real = (
        None if bool((seen >= n).all()) else (torch.arange(n, device=seen.device) < seen[:, None, None, None])
    )
    return top_k(affinity, min(count, n), real)


def attend_balanced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    keys: Tensor,
    layout: Layout,
    scale: float,
    options: Options,
) -> Tensor:
    """Return the mean over clusters of attention inside each, [B, H, T, Dv], of compact rows.

    Args:
        q, k, v: [B, H, T, D], [B, H, S, D] and [B, H, S, Dv], compact, in one dtype.
        rows, keys: as `members` gives them, [B, H, C, R] and [B, H, C, n].
    """
    if not rows.numel() or not keys.numel():
        return q.new_zeros(*q.shape[:3], v.shape[3])
    out, lse = attend_blocks(q, k, v, keys, rows=rows, visible=_visible(layout, options), scale=scale)
    if options.mask_self:
        at = rows + layout.offset.view(-1, 1, 1, 1)
        alone = (lse == -torch.inf) & _listed(keys, at, k.shape[2]) & (rows >= 0)
        out = torch.where(alone[..., None], _values(v, at), out)
    return _mean(out, rows, q.shape[2], options.damping)


def _visible(layout: Layout, options: Options) -> Visible | None:
    """Which of the keys of its cluster a row sees; None for all."""
    offset = layout.offset.view(-1, 1, 1, 1, 1)
    if layout.causal:
        return lambda i, j: j < i + offset if options.mask_self else j <= i + offset
    return (lambda i, j: j != i + offset) if options.mask_self else None


def _listed(keys: Tensor, at: Tensor, length: int) -> Tensor:
    """Whether keys `at` [B, H, C, R] are among those of their cluster [B, H, C, n]."""
    found = torch.zeros(*keys.shape[:3], length + 1, dtype=torch.bool, device=keys.device)
    found = found.scatter_(3, torch.where(keys < 0, length, keys), True)
    return found.gather(3, at.clamp(0, length))


def _values(v: Tensor, at: Tensor) -> Tensor:
    """Values [B, H, C, R, Dv] of keys `at` [B, H, C, R]."""
    places = at.clamp(0, v.shape[2] - 1).flatten(2)[..., None].expand(-1, -1, -1, v.shape[3])
    return v.gather(2, places).view(*at.shape, v.shape[3])


def _mean(out: Tensor, rows: Tensor, length: int, damping: float) -> Tensor:
    """[B, H, C, R, Dv] as [B, H, T, Dv]: the sum over the clusters of a row, over their number."""
    places = torch.where(rows < 0, length, rows).flatten(2)
    whole = out.new_zeros(*out.shape[:2], length + 1, out.shape[4])
    whole = whole.scatter_add(2, places[..., None].expand(-1, -1, -1, out.shape[4]), out.flatten(2, 3))
    count = whole.new_zeros(whole.shape[:3]).scatter_add_(2, places, whole.new_ones(places.shape))
    count = torch.where(count > 0, count + damping, 1.0)
    return whole[:, :, :length] / count[:, :, :length, None]


def warn_of_coverage(options: Options, length: int) -> None:
    """Warn where most tokens cannot be in any cluster."""
    room = options.clusters * options.cluster_size
    if room < ENOUGH * length:
        warnings.warn(
            f"{options.clusters} clusters of {options.cluster_size} hold at most {room} of {length} tokens; "
            "the others get 0 from these heads. Give clusters * cluster_size near the length.",
            stacklevel=2,
        )
