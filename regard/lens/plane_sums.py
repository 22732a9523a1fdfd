"""Numbers of maps and rows of weights over a plane of H x W positions.

For a row of weights A over the positions, or for a map of one head, with p_j = |A_j| / sum_j |A_j| and n the
number of positions with weight (of a map all):

    entropy    = -sum p log p / log n                    0 for one position alone, 1 for all alike
    sharpness  = n max_j p_j                             1 for all alike
    border     = sum of p on the outermost positions / the share of them among the n      1 for all alike
    distance   = sum_j p_j |centre of i - centre of j|   pixels of the image; rows only
    off_image  = 1 - sum_j A_j                           rows only: weight on what is no position
    negative   = share of sum |A| where A < 0            gates only
    size       = mean |A|                                gates and factors only

The distance is the mean attention distance of Dosovitskiy et al., 2020, arXiv 2010.11929, appendix D.7, in
the plane; the others are our choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int]
COLUMNS = ("entropy", "sharpness", "border", "distance", "off_image", "negative", "size")
MEANING = {
    "entropy": "entropy of the weights over the positions, relative to the greatest possible: 1 is even",
    "sharpness": "the largest weight, relative to an even one",
    "border": "weight on the outermost positions, relative to even weights",
    "distance": "mean distance between a position and those it attends to, in pixels",
    "off_image": "weight on what is no position of the image: a class token, registers, padding",
    "negative": "share of the map's absolute size that is below zero",
    "size": "mean absolute value of the map",
    "varies": "share of the map's squared size that differs between images: 0 is the same for all",
}
TINY, ROUNDING, SPARSE = 1e-30, 2e-6, 0.7


class PlaneSums:
    """Sums over rows of weights, added in parts.

    Args:
        queries, keys: height and width of their planes.
        pixels: height and width of the image.
    """

    def __init__(self, queries: Grid, keys: Grid, pixels: Grid) -> None:
        self.queries, self.keys, self.pixels = queries, keys, pixels
        self.total = self.count = self.received = torch.zeros(0)
        self.rows = 0

    def add(self, rows: Tensor, at: Tensor) -> None:
        """Add the weights [B, heads, Q, H W] of queries at positions [Q] of their plane."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        received = rows.sum(2)
        self.received = self.received + received if self.rows else received
        used = received.amax((0, 1)) > 0
        ring, apart = _ring(self.keys, rows), self._apart(at, rows)
        if used.float().mean() < SPARSE:
            rows, ring, apart = rows[..., used], ring[used], apart[:, used]
        sides = torch.stack([torch.ones_like(ring), ring], -1)
        (whole, border), (seen, edge) = (
            x.matmul(sides).unbind(-1) for x in (rows, (rows > 0).to(rows.dtype))
        )
        size = whole.clamp_min(TINY)
        spread = torch.special.entr(rows).sum(-1) / size + size.log()
        total = [
            (spread / seen.clamp_min(2).log()).clamp(0, 1), rows.amax(-1) / size * seen, border / size,
            torch.einsum("bhqn,qn->bhq", rows, apart) / size, _off(whole),
        ]  # fmt: skip
        count = torch.ones_like(whole)
        self._sum(total, [count, count, edge / seen.clamp_min(1), count, count])
        self.rows += rows.shape[2]

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return the sums of `COLUMNS` over batch and queries, [columns, heads], and what to divide by."""
        return self.total, self.count

    def mean_received(self) -> Tensor:
        """Return the mean weight that each position receives, [B, heads, H, W]."""
        return (self.received / max(1, self.rows)).unflatten(-1, self.keys)

    def _sum(self, total: list[Tensor], count: list[Tensor]) -> None:
        nothing = [torch.zeros_like(total[0])] * (len(COLUMNS) - len(total))
        parts = [torch.stack([*x, *nothing]).sum((1, 3), dtype=torch.float64) for x in (total, count)]
        if self.rows:
            parts = [self.total + parts[0], self.count + parts[1]]
        self.total, self.count = parts

    def _apart(self, at: Tensor, like: Tensor) -> Tensor:
        """Distances in pixels between the centres of queries and keys, [Q, H W]."""
        own = centres(self.queries, self.pixels).to(like)[at]
        return torch.cdist(own, centres(self.keys, self.pixels).to(like))


def of_maps(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the sums of `COLUMNS` of maps [B, heads, H, W] over the batch, and what to divide by."""
    grid: Grid = (values.shape[2], values.shape[3])
    flat = values.flatten(2).double()
    sizes = flat.abs()
    whole = sizes.sum(-1)
    share = sizes / whole.clamp_min(TINY)[..., None]
    places = share.shape[-1]
    entropy = torch.special.entr(share).sum(-1) / math.log(max(2, places))
    sharpness, border = share.amax(-1) * places, share @ _ring(grid, share)
    one, none = torch.ones_like(whole), torch.zeros_like(whole)
    signed, sized = one * (kind == "gate"), one * (kind != "probability")
    below = (share * (flat < 0)).sum(-1) * signed
    total = [entropy, sharpness, border, none, none, below, sizes.mean(-1) * sized]
    even = one * _ring(grid, share).mean()
    count = [one, one, even, none, none, signed, sized]
    return torch.stack(total).sum(1), torch.stack(count).sum(1)


def centres(grid: Grid, pixels: Grid) -> Tensor:
    """Return where the middle of each position is, in pixels, float32 [H W, 2] as (y, x).

    Example:
        >>> centres((1, 2), (4, 8)).tolist()
        [[2.0, 2.0], [2.0, 6.0]]
    """
    y, x = ((torch.arange(n) + 0.5) * size / n for n, size in zip(grid, pixels, strict=True))
    return torch.cartesian_prod(y, x)


def spread_positions(grid: Grid, most: int) -> Tensor:
    """Return at most so many positions of a plane in even steps, int64 [Q], row by row.

    Example:
        >>> spread_positions((4, 4), 4).tolist()
        [5, 7, 13, 15]
    """
    step = 1
    while math.ceil(grid[0] / step) * math.ceil(grid[1] / step) > most:
        step += 1
    y, x = (torch.arange(min(step // 2, n - 1), n, step) for n in grid)
    return (y[:, None] * grid[1] + x).flatten()


def _off(whole: Tensor) -> Tensor:
    """What a row of this sum lacks to 1, but for rounding."""
    lacks = (1 - whole).clamp_min(0)
    return lacks * (lacks > ROUNDING)


def _ring(grid: Grid, like: Tensor) -> Tensor:
    """1 at the outermost positions of a plane and 0 within, [H W]."""
    inside = like.new_ones(grid)
    inside[1:-1, 1:-1] = 0
    return inside.flatten()
