"""Which regions a region attends to, and attention of its tokens to theirs.

    r_i = mean over the real tokens of region i, all heads together, without gradient     queries and keys
    A_ij = rq_i . rk_j                                                                     [B, R, R]
    idx_i = the k largest of A_i, of regions that have tokens                              [B, R, k]
    o = softmax(scale q K^T) V,   K, V the tokens of the regions idx_i                     all heads alike

Source: Zhu et al., 2023, arXiv 2303.08810, section 3.2. Status: agrees with the official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.attention.biformer.regions import Regions
from regard.engines.blocks import attend_blocks


@dataclass(frozen=True, eq=False)
class RegionRouting:
    """Which regions each region attends to.

    Attributes:
        index: int64 [B, R, k], the chosen regions, the best first; -1 where fewer have tokens.
        scores: [B, R, R], products of the mean queries and mean keys of regions; -inf for a region without
            tokens. A positive factor on them changes nothing.
        regions: how the map is cut; regions are numbered row by row.

    Example:
        >>> routing = RegionRouting(torch.tensor([[[1], [0]]]), torch.eye(2)[None], Regions((4,), (2,)))
        >>> routing.seen(0).tolist()
        [False, False, True, True]
    """

    index: Tensor
    scores: Tensor
    regions: Regions

    def chosen(self) -> Tensor:
        """Return which regions each region attends to, bool [B, R, R]."""
        batch, count, _ = self.index.shape
        found = torch.zeros(batch, count, count + 1, dtype=torch.bool, device=self.index.device)
        return found.scatter_(2, torch.where(self.index < 0, count, self.index), True)[..., :count]

    def seen(self, region: int, item: int = 0) -> Tensor:
        """Return the tokens that a region attends to, bool of the shape of the map."""
        tokens = self.chosen()[item, region][:, None].expand(-1, self.regions.tokens)
        return self.regions.joined(tokens[None])[0]


def route(q: Tensor, k: Tensor, regions: Regions, topk: int, real: Tensor | None = None) -> RegionRouting:
    """Return the regions that each region chooses.

    Args:
        q, k: [B, R, T, H, D].
        regions: how the map is cut.
        topk: how many are chosen, 1 to R.
        real: bool [B|1, R, T], tokens that count; None for all.
    """
    queries, keys = (_means(x.detach().flatten(3), real) for x in (q, k))
    scores = queries @ keys.transpose(1, 2)
    if real is not None:
        scores = scores.masked_fill(~real.any(2)[:, None], -torch.inf)
    best, index = scores.topk(topk, -1)
    if real is not None:
        index = torch.where(best == -torch.inf, -1, index)
    return RegionRouting(index, scores, regions)


def _means(x: Tensor, real: Tensor | None) -> Tensor:
    """The mean of each region's real tokens, [B, R, C], at least in float32; 0 where it has none."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if real is None:
        return x.mean(2, dtype=kind)
    counted = x.to(kind).masked_fill(~real[..., None], 0.0).sum(2)
    return counted / real.sum(2, keepdim=True).clamp_min(1)


def attend_routed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float, visible: Tensor | None = None
) -> Tensor:
    """Return attention of each region's tokens to those of its regions, [B, R, T, H, Dv].

    Args:
        q, k: [B, R, T, H, D]; v: [B, R, T, H, Dv].
        index: int64 [B, R, k], as `RegionRouting` has it.
        scale: factor on q k^T.
        visible: bool [B|1, R, T], keys that may be seen; None for all.
    """
    batch, count, tokens, heads, _ = q.shape
    if index.shape[2] == count:
        return _attend_all(q, k, v, scale, visible)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    seen = None
    if visible is not None:
        items = torch.arange(len(visible), device=index.device)[:, None, None]
        seen = visible[items, index.clamp_min(0)].flatten(2)[:, None, :, None]
    out, _ = attend_blocks(
        q, k, v, index[:, None], key_block=tokens, query_block=tokens, visible=seen, scale=scale
    )
    return out.transpose(1, 2).reshape(batch, count, tokens, heads, -1)


def _attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """Attention to the tokens of all regions."""
    mask = None
    if visible is not None:
        seen = visible.flatten(1)
        mask = (seen | ~seen.any(1, keepdim=True))[:, None, None]
    shape = q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, shape)


def weights_by_definition(
    q: Tensor, k: Tensor, routing: RegionRouting, scale: float, visible: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the weights of queries over the keys of all regions, [B, H, Q, R T], by definition.

    They are float32, or float64 where q is, and 0 where nothing is seen.

    Args:
        q, k: [B, R, T, H, D].
        routing: who looks where.
        scale: factor on q k^T.
        visible: bool [B|1, R, T], keys that may be seen; None for all.
        rows: int64 [Q], the queries, numbered region by region; None for all.
    """
    tokens, kind = q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys = (x.flatten(1, 2).transpose(1, 2).to(kind) for x in (q, k))
    seen = routing.chosen()
    every = torch.arange(queries.shape[2], device=q.device) if rows is None else rows
    seen = seen[:, every // tokens].repeat_interleave(tokens, 2)
    if visible is not None:
        seen = seen & visible.flatten(1)[:, None]
    scores = queries[:, :, every] @ keys.transpose(-1, -2) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True)
    weights = (scores - torch.where(peak == -torch.inf, 0.0, peak)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)
