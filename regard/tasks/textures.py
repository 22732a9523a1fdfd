"""Textures made by a seed: a class is a kind of pattern; size, turn and colours are of each image.

    u, v     the pixel's place in periods p, turned by an angle and moved
    stripes  sign sin 2 pi u                    checks  sign(sin 2 pi u sin 2 pi v)
    waves    sin(2 pi u + 2 sin 2 pi v)         rings   sign sin 2 pi |(u, v)|
    grid     lines at whole u and v             bricks  the same, every second row moved by half
    dots     discs at whole u and v             grain   noise that is smooth over half a period

Two colours are drawn for each image, and noise is added to every pixel. Source: our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import RegardError
from regard.tasks.images import Images, check_size

if TYPE_CHECKING:
    from torch import Generator

TURN = 2 * math.pi


def _lines(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(u - u.floor(), v - v.floor()).lt(0.25).double() * 2 - 1


def _bricks(u: Tensor, v: Tensor) -> Tensor:
    return _lines((u + v.floor() % 2) / 2, v)


def _dots(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u - u.round(), v - v.round()) < 0.3).double() * 2 - 1


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stripes": lambda u, v: (TURN * u).sin().sign(),
    "checks": lambda u, v: ((TURN * u).sin() * (TURN * v).sin()).sign(),
    "dots": _dots,
    "waves": lambda u, v: (TURN * u + 2 * (TURN * v).sin()).sin(),
    "grid": _lines,
    "bricks": _bricks,
    "rings": lambda u, v: (TURN * torch.hypot(u, v)).sin().sign(),
    "grain": lambda u, v: u,
}


def textures(
    size: int = 32, channels: int = 3, *, kinds: Sequence[str] = tuple(KINDS), train: int = 160,
    held_out: int = 40, noise: float = 0.08, seed: int = 0,
) -> Images:  # fmt: skip
    """Return images of textures.

    Args:
        size: height and width, from 8.
        channels: 3 for colour, 1 for grey.
        kinds: classes, a tuple of two at least of `KINDS`.
        train, held_out: images of each class.
        noise: standard deviation of what is added to a pixel, of values 0 to 1.
        seed: of everything.

    Raises:
        RegardError: where an argument will not do.

    Example:
        >>> str(textures(16, kinds=("stripes", "dots"), train=5, held_out=2))
        'textures: 2 classes, 10 images to train on, 4 held out, 16 x 16 colour'
    """
    check_size(size)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or len(set(kinds)) < max(2, len(kinds)):
        raise RegardError(f"kinds are {list(kinds)}; they must be two at least of {', '.join(KINDS)}.")
    if size < 8 or channels not in (1, 3) or train < 1 or held_out < 1 or not 0 <= noise < 1:
        raise RegardError(
            f"size {size}, channels {channels}, train {train}, held_out {held_out}, noise {noise}: there "
            "must be 8 pixels, 1 or 3 channels and an image a class at least, and noise below 1."
        )
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (train, held_out):
        drawn = [_drawn(kind, count, size, channels, noise, generator) for kind in kinds]
        parts += [torch.cat(drawn), torch.arange(len(kinds)).repeat_interleave(count)]
    return Images("textures", tuple(kinds), *parts)


def _drawn(kind: str, count: int, size: int, channels: int, noise: float, generator: Generator) -> Tensor:
    """Images of one kind, uint8 [count, channels, size, size]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    period = 4 + uniform(1, 1) * max(1.0, size / 4 - 4)
    value = (
        _grain(size, period, generator) if kind == "grain" else KINDS[kind](*_turned(size, period, uniform))
    )
    share = (value[:, None] + 1) / 2
    dark, bright = uniform(channels, 1, 1) * 0.4, 1 - uniform(channels, 1, 1) * 0.4
    swapped = uniform(1, 1, 1) < 0.5
    first, second = torch.where(swapped, bright, dark), torch.where(swapped, dark, bright)
    image = first + (second - first) * share
    image = image + noise * torch.randn(image.shape, generator=generator, dtype=torch.float64)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _turned(size: int, period: Tensor, uniform: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Places of pixels in periods, [count, size, size] each."""
    angle, phase = TURN * uniform(1, 1), 2 * uniform(2, 1, 1)
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) - size / 2] * 2, indexing="ij")
    u = (x * angle.cos() + y * angle.sin()) / period + phase[:, 0]
    v = (y * angle.cos() - x * angle.sin()) / period + phase[:, 1]
    return u, v


def _grain(size: int, period: Tensor, generator: Generator) -> Tensor:
    """Smooth noise of each period, between -1 and 1, [count, size, size]."""
    found = []
    for each in period.flatten().tolist():
        cells = max(2, round(2 * size / each))
        coarse = torch.randn(1, 1, cells, cells, generator=generator, dtype=torch.float64)
        found.append(F.interpolate(coarse, (size, size), mode="bicubic")[0, 0].mul(2).tanh())
    return torch.stack(found)
