"""What the study of HaloNet is made of: the rule pixel by pixel with faults, marks, and ways to compute.

Nothing of the engine is used in the rule. Marks: images of two binary channels, brightness, on at half of the
pixels, and marks, at a fifth of those that have a pixel two columns to the right; what is asked at a mark is
the brightness there. Status: our choice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.halo import HaloAttention, halo_attention

SIDE, CHANNELS, BATCH, RATE, DISTANCE = 16, 32, 16, 5e-3, 2
FAULTS = ("centred", "swapped", "masked", "reduced")
"""Tables whose middle is at no distance, tables of the other axis, a masked border, and queries of a strided
block counted one by one in the tables."""


@dataclass(frozen=True)
class Case:
    """A map, and attention on it: sides, blocks and halos by axis, stride and border."""

    sides: tuple[int, int]
    blocks: tuple[int, int]
    halos: tuple[int, int]
    stride: int
    border: str


def drawn(chance: random.Random, stride: int) -> Case:
    """Return a map of two to three blocks by two; blocks differ by axis, windows are 6 x 6."""
    first = chance.choice((2, 4))
    blocks, halos = (first, 6 - first), ((6 - first) // 2, first // 2)
    return Case((first * chance.randint(2, 3), 2 * (6 - first)), blocks, halos, stride, "zero")


def by_pixels(
    q: Tensor, k: Tensor, v: Tensor, rel: tuple[Tensor, Tensor], case: Case, fault: str = ""
) -> Tensor:
    """Return attention [B, Y, X, H, D], one query after another, with offsets written out."""
    border = "mask" if fault == "masked" else case.border
    step = 1 if fault == "reduced" else case.stride
    windows = [b + 2 * h for b, h in zip(case.blocks, case.halos, strict=True)]
    rows = []
    for place in itertools.product(*(range(0, side, case.stride) for side in case.sides)):
        own = q[:, place[0] // case.stride, place[1] // case.stride]
        inside = [at % b for at, b in zip(place, case.blocks, strict=True)]
        first = [at - i - h for at, i, h in zip(place, inside, case.halos, strict=True)]
        scores, values = [], []
        for window in itertools.product(*(range(w) for w in windows)):
            key = [f + u for f, u in zip(first, window, strict=True)]
            there = all(0 <= at < side for at, side in zip(key, case.sides, strict=True))
            if not there and border == "mask":
                continue
            score = torch.zeros_like(own[..., 0])
            if there:
                score = (own * k[:, key[0], key[1]]).sum(-1) * q.shape[-1] ** -0.5
            for axis, (w, u, i, h) in enumerate(zip(windows, window, inside, case.halos, strict=True)):
                row = w - 1 + u - step * (i // case.stride) - (h if fault == "centred" else 0)
                score = score + own @ rel[1 - axis if fault == "swapped" else axis][row]
            scores.append(score)
            values.append(v[:, key[0], key[1]] if there else torch.zeros_like(v[:, 0, 0]))
        weights = torch.stack(scores, -1).softmax(-1)
        rows.append((weights[..., None, :] @ torch.stack(values, -2))[..., 0, :])
    return torch.stack(rows, 1).unflatten(1, q.shape[1:3])


def error_of(case: Case, fault: str = "", heads: int = 2, width: int = 6) -> float:
    """Return how far outputs and gradients are from those of the rule, in float64."""
    fewer = [side // case.stride for side in case.sides]
    windows = [b + 2 * h for b, h in zip(case.blocks, case.halos, strict=True)]
    shapes = [(1, *grid, heads, width) for grid in (fewer, case.sides, case.sides)]
    shapes += [(2 * w - 1, width) for w in windows]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    q, k, v, down, across = given
    out = halo_attention(q, k, v, case.blocks, case.halos, (down, across), case.border, case.stride)
    exact = by_pixels(q, k, v, (down, across), case, fault)
    told = torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).view(out.shape)
    found, expected = (torch.autograd.grad((x * told).sum(), given) for x in (out, exact))
    pairs = zip((out, *found), (exact, *expected), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def moved(step: int) -> float:
    """Return how far the interior is from moving with the map, blocks of 4 with a halo of 2, float32."""
    q, k, v = given = torch.randn(3, 1, 20, 20, 2, 8)
    out = halo_attention(q, k, v, 4, 2)
    q, k, v = given.roll((step, step), (2, 3))
    back = halo_attention(q, k, v, 4, 2).roll((-step, -step), (1, 2))
    return float((back - out)[:, 4:12, 4:12].abs().max())


def marks(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return images [size, 2, 16, 16], what is asked [size, 16, 16] and where, bool of that shape."""
    bright = torch.rand(size, SIDE, SIDE, generator=generator) < 0.5
    marked = torch.rand(size, SIDE, SIDE, generator=generator) < 0.2
    marked[:, :, SIDE - DISTANCE :] = False
    return torch.stack([bright, marked], 1).float(), bright.roll(-DISTANCE, 2).float(), marked


class Marker(nn.Module):
    """One layer of halo attention around a residual stream, a norm, and an MLP at every pixel."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(2, CHANNELS, 1), attention
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.mlp = nn.Sequential(nn.Conv2d(CHANNELS, 64, 1), nn.GELU(), nn.Conv2d(64, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 16, 16] of images [B, 2, 16, 16]."""
        x = self.stem(images)
        out: Tensor = self.mlp(self.norm(x + self.attention(x)))
        return out[:, 0]


def marked_accuracy(
    options: dict[str, Any], steps: int, seed: int, tick: Callable[[float], None]
) -> dict[str, float]:
    """Train on marks; return the accuracy where the pixel asked for is in the block, and across its edge."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Marker(HaloAttention(CHANNELS, heads=1, **options))
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(steps):
        images, labels, where = marks(BATCH, generator)
        loss = F.binary_cross_entropy_with_logits(model(images)[where], labels[where])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick((step + 1) / steps)
    model.eval()
    images, labels, where = marks(256, generator)
    with torch.no_grad():
        right = (model(images) > 0) == (labels > 0)
    block = options["block"]
    across = (torch.arange(SIDE) % block >= block - DISTANCE).expand(right.shape)
    return {name: float(right[where & chosen].double().mean())
            for name, chosen in (("inside", ~across), ("across", across))}  # fmt: skip


def ways(side: int) -> dict[str, Callable[[], Any]]:
    """Return attention of a map, four heads of 32, blocks of 8 with a halo of 3, computed in three ways."""
    q, k, v = torch.randn(3, 1, side, side, 4, 32)
    at = torch.arange(side)
    first = at // 8 * 8
    near = (at >= first[:, None] - 3) & (at < first[:, None] + 11)
    mask = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    flat_q, flat_k, flat_v = (x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v))
    return {
        "halo": lambda: halo_attention(q, k, v, 8, 3, border="mask"),
        "unfolded": lambda: unfolded(q, k, v),
        "dense": lambda: F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=mask),
    }


def unfolded(q: Tensor, k: Tensor, v: Tensor, block: int = 8, halo: int = 3) -> Tensor:
    """Return attention with a masked border as it is usually written: pad, unfold, products and a softmax."""
    side, heads, width = q.shape[1], q.shape[3], block + 2 * halo
    count = (side // block) ** 2

    def windows(x: Tensor) -> Tensor:
        padded = F.pad(x.permute(0, 3, 4, 1, 2)[0], (halo,) * 4)
        parts = padded.unfold(2, width, block).unfold(3, width, block)  # [H, D, n, n, w, w]
        return parts.reshape(heads, x.shape[-1], count, -1).permute(0, 2, 3, 1)

    blocks = q[0].unflatten(0, (-1, block)).unflatten(2, (-1, block))  # [n, b, n, b, H, D]
    blocks = blocks.permute(4, 0, 2, 1, 3, 5).reshape(heads, count, -1, q.shape[-1])
    scores = blocks @ windows(k).mT * q.shape[-1] ** -0.5
    inside = windows(torch.ones(1, side, side, heads, 1))[..., 0]
    weights = scores.masked_fill(inside[:, :, None] == 0, -torch.inf).softmax(-1)
    out = (weights @ windows(v)).unflatten(1, (side // block, -1)).unflatten(3, (block, block))
    return out.permute(1, 3, 2, 4, 0, 5).reshape(q.shape)
