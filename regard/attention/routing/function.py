"""Routing attention of given queries, keys, values and centroids."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.attention.checks import check_call, refuse_nan
from regard.attention.mechanism import Context
from regard.attention.routing.heads import BalancedHeads, RoutingHeads
from regard.attention.routing.options import Options
from regard.errors import RegardError, ShapeMismatch


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    cluster_size: int = 64,
    selection: str = "causal",
    nearest: int = 2,
    norm: str = "layernorm",
    scale: float | None = None,
    mask_self: bool = False,
    damping: float = 0.01,
    causal: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """Return attention of tokens to those of their own content clusters.

    Args:
        q: [B, H, T, D]; where causal, the last T of the S positions.
        k: [B, Hkv, S, D]; H is a multiple of Hkv.
        v: [B, Hkv, S, Dv].
        centroids: [H, C, D], or [1, C, D] for all heads.
        cluster_size, selection, nearest, norm, scale, mask_self, damping: as in `Options`: by "causal" a
            token sees the last `cluster_size` members of its `nearest` clusters; by "topw" each centroid
            takes `cluster_size` queries and keys of the whole, as published, and earlier outputs depend on
            later tokens.
        causal: whether a row sees no later key; without, selection is "topw".
        valid: bool [B, S], False at padding.

    Returns:
        [B, H, T, Dv], in the dtype of v; 0 for a token that is in no cluster or sees no key.

    Raises:
        ShapeMismatch: where shapes do not fit together.
        RegardError: for an option that will not do, NaN or infinity, or "topw" with keys of a cache.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 100, 8)
        >>> routing_attention(q, k, v, torch.randn(2, 5, 8), cluster_size=20).shape
        torch.Size([1, 2, 100, 8])
    """
    check_call(q, k, v)
    heads, width = q.shape[1], q.shape[3]
    if centroids.ndim != 3 or centroids.shape[0] not in (1, heads) or centroids.shape[2] != width:
        raise ShapeMismatch(
            f"centroids are {list(centroids.shape)}; they must be [{heads} or 1, clusters, {width}]."
        )
    refuse_nan(centroids=centroids)
    options = Options(
        clusters=centroids.shape[1], cluster_size=cluster_size, selection=selection,
        nearest=nearest if selection == "causal" else 1, norm=norm, scale=scale, mask_self=mask_self,
        damping=damping,
    )  # fmt: skip
    if selection == "causal" and not causal:
        raise RegardError("selection 'causal' sees no later key; give selection='topw' where causal=False.")
    kind = RoutingHeads if selection == "causal" else BalancedHeads
    module = kind(options, heads, 0, width, 1, decay=1.0, device=torch.device("meta")).eval()
    assert module.clusters is not None
    module.clusters.centroids = centroids.detach().expand(heads, -1, -1)
    return module(q, k, v, replace(Context.of(q, k, causal=causal, valid=valid)))
