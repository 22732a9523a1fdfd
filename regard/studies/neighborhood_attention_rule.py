"""The rule of neighbourhood attention, written key by key, the same with planted faults, and grids to try.

    g = i mod d,  p = i div d,  L = ceil((X - g) / d)             the group of query i, and its place there
    lead = min((p div s) s + (s div 2), L - 1),  start = clamp(lead - (k div 2), 0, L - k)
    lead = min((p div s) s + s - 1, L - 1),      start = max(lead - (k - 1), 0)               causal
    keys g + d t,  t = start .. start + k - 1, or start .. p in causal order

Nothing of the engine is used here. Status: agrees with natten's reference by reading.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

Option = tuple[int, int, int, bool]
Grid = tuple[tuple[int, Option], ...]

FAULTS: dict[str, Grid] = {
    "cut": ((14, (5, 1, 1, False)), (9, (3, 1, 1, False))),
    "floor": ((17, (5, 1, 3, False)),),
    "right": ((13, (4, 1, 1, False)),),
    "own": ((14, (5, 3, 1, True)),),
}
"""What goes wrong, and where: windows cut off at the border, groups of one length where dilation does not
divide, the odd key of an even window after the query, causal windows that begin by their query alone."""


def keys_of(i: int, length: int, option: Option, fault: str = "") -> list[int]:
    """Return the keys that position `i` of an axis sees; option is kernel, stride, dilation and order."""
    k, s, d, causal = option
    g, p = i % d, i // d
    size = length // d if fault == "floor" else -(-(length - g) // d)
    if causal:
        lead = p if fault == "own" else min(p // s * s + s - 1, size - 1)
        start, stop = max(lead - (k - 1), 0), p + 1
    else:
        lead = min(p // s * s + s // 2, size - 1)
        start = lead - k // 2 + (fault == "right")
        start = start if fault == "cut" else min(max(start, 0), size - k)
        stop = start + k
    return [g + d * t for t in range(start, stop) if t >= 0 and g + d * t < length]


def mask_of(grid: Grid, fault: str = "") -> Any:
    """Return which keys each query sees, bool [N, N]."""
    import torch

    lengths = [length for length, _ in grid]
    count = math.prod(lengths)
    places = list(itertools.product(*(range(n) for n in lengths)))
    number = {place: i for i, place in enumerate(places)}
    seen = torch.zeros(count, count, dtype=torch.bool)
    for i, place in enumerate(places):
        near = [keys_of(at, n, option, fault) for at, (n, option) in zip(place, grid, strict=True)]
        seen[i, [number[key] for key in itertools.product(*near)]] = True
    return seen


def drawn(chance: random.Random, axes: int) -> Grid:
    """Return a grid with random kernels, strides, dilations and orders."""
    most = (24, 9, 6)[axes - 1]
    grid = []
    for _ in range(axes):
        length = chance.randint(4, most)
        kernel = chance.randint(2, length)
        grid.append(
            (
                length,
                (
                    kernel,
                    chance.randint(1, kernel),
                    chance.randint(1, length // kernel),
                    chance.random() < 0.4,
                ),
            )
        )
    return tuple(grid)


def error_of(grid: Grid, fault: str = "", heads: int = 2, width: int = 8) -> float:
    """Return how far attention and its gradients are from those under the mask of the rule, in float64."""
    import torch

    from regard.attention.neighborhood import na1d, na2d, na3d

    attend = (na1d, na2d, na3d)[len(grid) - 1]
    shape = [length for length, _ in grid]
    given = [torch.randn(1, *shape, heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    kernel, stride, dilation, order = zip(*(option for _, option in grid), strict=True)
    q, k, v = given
    out = attend(q, k, v, kernel, stride, dilation, order)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in given)
    scores = (q @ k.mT * width**-0.5).masked_fill(~mask_of(grid, fault), -torch.inf)
    exact = (scores.softmax(-1) @ v).transpose(1, 2).reshape(out.shape)
    told = torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).view(out.shape)
    found, expected = (torch.autograd.grad((x * told).sum(), given) for x in (out, exact))
    pairs = zip((out, *found), (exact, *expected), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)
