"""Rotary positions that are given back and taken anew: a key turned as at p is turned on to as at p'.

A rotary score depends on the difference of two positions alone, so that a key is kept as it stands inside its
block, and only the few queries are turned to each distance that a block is read at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.positions import Rotary
from regard.errors import ShapeMismatch, UnsupportedModel

STEADY = ("default", "linear", "llama3", "yarn")


class Turns(nn.Module):
    """Turn queries or keys from some positions to others.

    Args:
        rates: radians a position, [R], of the pairs (x_c, x_{c + R}) of the first 2 R channels; or
            the base of rotary embedding of all channels, as in `Rotary`.

    Example:
        >>> x, at, turns = torch.randn(1, 1, 3, 4), torch.arange(3), Turns(10000.0)
        >>> torch.allclose(turns(turns(x, at, at + 7), at + 7, at), x, atol=1e-6)
        True
    """

    rates: Tensor | None

    def __init__(self, rates: Tensor | float) -> None:
        super().__init__()
        self.base = None if isinstance(rates, Tensor) else float(rates)
        self.register_buffer("rates", rates if isinstance(rates, Tensor) else None, persistent=False)

    def forward(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return x [..., T, D] at positions `after` int64 [T], of x at `before` [T].

        Raises:
            ShapeMismatch: where x has too few channels, or an odd number.
        """
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        rates = self._rates(x.shape[-1], kind, x.device)
        # angles are rounded as whoever turned x rounded them, and their difference is not
        angles = [(at.to(x.device, kind)[..., None] * rates).double() for at in (after, before)]
        by = angles[0] - angles[1]
        cos, sin = by.cos().to(kind), by.sin().to(kind)
        width = rates.shape[0]
        a, b, rest = x[..., :width].to(kind), x[..., width : 2 * width].to(kind), x[..., 2 * width :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest.to(kind)], -1)

    def _rates(self, width: int, kind: torch.dtype, device: torch.device) -> Tensor:
        if self.rates is None:
            assert self.base is not None
            if width % 2:
                raise ShapeMismatch(f"rotary positions need an even width a head, and it is {width}.")
            return self.base ** -(torch.arange(0, width, 2, dtype=kind, device=device) / width)
        if 2 * self.rates.shape[0] > width:
            raise ShapeMismatch(f"positions turn {2 * self.rates.shape[0]} channels, and a head has {width}.")
        return self.rates.to(device, kind)


def turns_of_module(module: nn.Module) -> Turns:
    """Return the turns that an attention module's queries and keys have, of Llama and models like it.

    Raises:
        UnsupportedModel: where it has no rotary positions, or such as depend on the length, or other
            pairs.
    """
    kind = type(module).__name__
    positions = getattr(module, "positions", None)
    if isinstance(positions, Rotary):
        return Turns(positions.theta)
    found = sys.modules.get(type(module).__module__)
    made = [
        value for name, value in vars(found).items()
        if name.endswith("RotaryEmbedding") and isinstance(value, type)
    ] if found is not None else []  # fmt: skip
    apply = getattr(found, "apply_rotary_pos_emb", None)
    config: Any = getattr(module, "config", None)
    how = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if len(made) != 1 or apply is None or how is None or getattr(config, "no_rope_layers", None):
        raise UnsupportedModel(
            f"{kind} does not tell its rotary positions as Llama does, so blocks cannot be given positions "
            'anew; use positions="true".'
        )
    if how not in STEADY:
        raise UnsupportedModel(
            f"{kind} has rotary positions of type {how!r}, which depend on the length of the text; use "
            'positions="true".'
        )
    turns = Turns(made[0](config=config).inv_freq.detach().clone())
    _check_pairs(kind, turns, apply, int(module.head_dim))  # type: ignore[arg-type]
    return turns


def _check_pairs(kind: str, turns: Turns, apply: Callable[..., Any], width: int) -> None:
    """Refuse a model that turns other pairs of channels than Llama."""
    x, at = torch.linspace(-1, 1, 3 * width).view(1, 1, 3, width), torch.tensor([0, 3, 11])
    assert turns.rates is not None
    angles = (at[:, None].float() * turns.rates.float()).repeat(1, 2)[None]
    try:
        theirs = apply(x, x, angles.cos(), angles.sin())[0]
    except (TypeError, RuntimeError, IndexError, ValueError):
        theirs = x
    if theirs.shape != x.shape or not torch.allclose(theirs, turns(x, at * 0, at), atol=1e-5):
        raise UnsupportedModel(f'{kind} turns other pairs of channels than Llama does; use positions="true".')
