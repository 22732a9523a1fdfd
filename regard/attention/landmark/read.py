"""Which closed blocks each query reads, and what it reads in them.

    chosen_i = the k blocks of the largest q_i . mark_b            mark: the key of the block's landmark
    (out_b, gate_b) = softmax attention inside block b, and the score of its landmark
    out_i = softmax over [lse of what is near, gate_b ...] of [out near, out_b ...]

With k = min(top_k, m) of m blocks, in the order of time, and d the distance in blocks from the section of the
query to a block, positions are those of a text in which the blocks stood next to each other:

    to be chosen   block i:            d = min(m - i, k + 1)
    to be read     the r-th chosen, i: d = k - r where i is of the last k blocks, and k - r + 1 otherwise

so that the last k blocks keep their distance, the order is kept, and nothing is farther than k + 1 blocks.
Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.2, with the positions of its code for Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regard.attention.select import random_scores, routing_scores, top_k
from regard.engines.blocks import attend_blocks

CHOICES = ("landmark", "mean", "recent", "random")


class Far(NamedTuple):
    """Closed blocks that may be read: marks [B, Hkv, m, D], keys [B, Hkv, m, L, D], values likewise."""

    marks: Tensor
    keys: Tensor
    values: Tensor

    def part(self, first: int, last: int) -> Far:
        """Return the blocks from `first` to before `last`."""
        return Far(*(x[:, :, first:last] for x in self))


class Reader:
    """How queries read blocks that are far.

    Args:
        most: blocks that a query reads.
        choose: one of `CHOICES`: by landmarks, by the mean key of a block, the last ones, or any.
        share: whether all heads of a token read the same blocks, those of the largest share in any head.
        scale: factor on scores.
    """

    def __init__(self, most: int, choose: str, share: bool, scale: float) -> None:
        self.most, self.choose, self.share, self.scale = most, choose, share, scale

    def count(self, far: Far) -> int:
        """Return k, how many blocks a query reads."""
        return min(self.most, far.marks.shape[2])

    def chosen(self, queries: Callable[[int], Tensor], far: Far) -> Tensor:
        """Return the numbers of the blocks to read, int64 [B, H, T, k], ascending.

        Args:
            queries: from a distance in blocks to the queries [B, H, T, D] as they see a block that far away.
        """
        k, m = self.count(far), far.marks.shape[2]
        last = queries(k + 1)
        shape = (*last.shape[:3], k)
        if self.choose == "recent":
            return torch.arange(m - k, m, device=last.device).expand(shape)
        if self.choose == "random":
            seed = int(torch.randint(2**62, (1,)))
            scores = random_scores((*shape[:3], m), torch.Generator(last.device).manual_seed(seed))
        else:
            marks = far.marks
            parts = [routing_scores(last, marks[:, :, : m - k], self.scale)]
            parts += [
                routing_scores(queries(d), marks[:, :, m - d : m - d + 1], self.scale)
                for d in range(k, 0, -1)
            ]
            scores = torch.cat(parts, -1)
            if self.share:
                scores = scores.softmax(-1).amax(1, keepdim=True).expand(*shape[:3], m)
        return top_k(scores, k)

    def distances(self, chosen: Tensor, blocks: int) -> Tensor:
        """Return how many blocks away each chosen one is read at, int64 [B, H, T, k], of m blocks."""
        k = chosen.shape[-1]
        return torch.arange(k, 0, -1, device=chosen.device) + (chosen < blocks - k)

    def read(self, queries: Callable[[int], Tensor], chosen: Tensor, far: Far) -> tuple[Tensor, Tensor]:
        """Return what is read of each chosen block [B, H, T, k, Dv], and its mark's score [B, H, T, k]."""
        k, m = chosen.shape[-1], far.marks.shape[2]
        turned = torch.stack([queries(d) for d in range(1, k + 2)], 3)  # [B, H, T, k + 1, D]
        which = (self.distances(chosen, m) - 1)[..., None].expand(*chosen.shape, turned.shape[-1])
        by_block = turned.gather(3, which) * self.scale
        if chosen.shape[2] == 1 or far.keys.device != by_block.device:
            return _fetched(by_block, chosen, far)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (by_block, far.keys, far.values))
        if by_block.device.type == "cpu" and not wanted:
            return _sorted(by_block, chosen, far)
        return _listed(by_block, chosen, far)


def merged(out: Tensor, lse: Tensor, read: Tensor, gates: Tensor) -> Tensor:
    """Return what is near [B, H, T, Dv], of log-sum-exp [B, H, T], and what was read, by one softmax."""
    shares = torch.cat([lse[..., None], gates], -1).softmax(-1)
    return shares[..., :1] * out + (shares[..., None, 1:] @ read)[..., 0, :]


def _listed(q: Tensor, chosen: Tensor, far: Far) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, T, k, D] inside its block each, and the scores of the landmarks."""
    block = far.keys.shape[3]
    token = torch.arange(block, device=q.device).view(1, 1, 1, 1, -1) < block - 1
    keys, values = far.keys.flatten(2, 3), far.values.flatten(2, 3)
    index = chosen.flatten(2)[..., None]
    out, _ = attend_blocks(q.flatten(2, 3), keys, values, index, key_block=block, visible=token, scale=1.0)
    marks = _taken(far.keys[:, :, :, -1], chosen)
    gates = (marks * q.reshape(marks.shape)).sum(-1)
    return out.view(*q.shape[:4], -1), gates.view(q.shape[:4])


def _sorted(q: Tensor, chosen: Tensor, far: Far) -> tuple[Tensor, Tensor]:
    """The same without gradients: queries are sorted by the block they read, all of a block at once."""
    kv_heads, blocks = far.keys.shape[1:3]
    units = torch.arange(q.shape[0] * kv_heads).view(q.shape[0], kv_heads, 1) * blocks
    place, order = (chosen.reshape(q.shape[0], kv_heads, -1) + units).flatten().sort()
    found, counts = place.unique_consecutive(return_counts=True)
    keys, values = far.keys.flatten(0, 2), far.values.flatten(0, 2)
    rows = q.reshape(-1, q.shape[-1])[order]
    out, gates = rows.new_empty(len(rows), values.shape[-1]), rows.new_empty(len(rows))
    ends = counts.cumsum(0).tolist()
    for block, start, end in zip(found.tolist(), [0, *ends], ends, strict=False):
        scores = rows[start:end] @ keys[block].T
        gates[start:end] = scores[:, -1]
        torch.mm(scores[:, :-1].softmax(-1), values[block, :-1], out=out[start:end])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return out[back].view(*q.shape[:4], -1), gates[back].view(q.shape[:4])


def _fetched(q: Tensor, chosen: Tensor, far: Far) -> tuple[Tensor, Tensor]:
    """The same of few queries, or of blocks on another device: what is read is fetched."""
    index = chosen.to(far.keys.device)
    keys, values = (_taken(x, index).to(q.device) for x in (far.keys, far.values))
    scores = (keys @ q.reshape(*keys.shape[:3], q.shape[-1], 1))[..., 0]
    out = (scores[..., None, :-1].softmax(-1) @ values[..., :-1, :])[..., 0, :]
    return out.view(*q.shape[:4], -1), scores[..., -1].view(q.shape[:4])


def _taken(blocks: Tensor, chosen: Tensor) -> Tensor:
    """Of blocks [B, Hkv, m, ...] those chosen [B, H, T, k], as [B, Hkv, G T k, ...]."""
    batch, heads = blocks.shape[:2]
    index = chosen.reshape(batch, heads, -1)
    row = torch.arange(batch, device=index.device)[:, None, None]
    return blocks[row, torch.arange(heads, device=index.device)[:, None], index]
