"""What tells attention where a token stands, by name: rotary embedding of queries and keys, or ALiBi's bias.

    rotary   the pair (x_c, x_{c + D/2}) turns by the angle p * theta^(-2 c / D), p the position
             Su et al., 2021, arXiv 2104.09864, equation 15, with the pairs of Llama's code
    alibi    S_ij = scale * q_i . k_j - m_h |p_i - p_j|,  m_h = 2^(-8 h / H), h = 1 ... H
             Press et al., 2021, arXiv 2108.12409, section 3, with the slopes of its code

Positions count valid tokens, so that padding changes none. Status: both agree with the official code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch


class Rotary(nn.Module):
    """Turn queries or keys by their positions.

    Args:
        theta: base of the angles.
        longest: positions that it allows, from 0 on; None for all.

    Example:
        >>> x = torch.ones(1, 1, 3, 2)
        >>> [round(a, 3) for a in Rotary()(x, torch.arange(3)[None])[0, 0, :, 0].tolist()]
        [1.0, -0.301, -1.325]
    """

    def __init__(self, theta: float = 10000.0, longest: int | None = None) -> None:
        super().__init__()
        if not theta > 0:
            raise RegardError(f"theta is {theta}; it must be above 0.")
        self.theta, self.longest = theta, longest

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """Return x [B, H, T, D], turned; `at` is int64 [B|1, T].

        Raises:
            ShapeMismatch: where D is odd.
            RegardError: for a position beyond `longest`.
        """
        width = x.shape[-1]
        if width % 2:
            raise ShapeMismatch(f"rotary positions need an even width a head, and it is {width}.")
        if self.longest is not None and at.numel() and int(at.max()) >= self.longest:
            raise RegardError(
                f"position {int(at.max())} is over the {self.longest} that these positions allow."
            )
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        turns = torch.arange(0, width, 2, dtype=kind, device=x.device) / width
        angles = (at[:, None, :, None].to(kind) * self.theta**-turns).repeat(1, 1, 1, 2)
        first, second = x.to(kind).chunk(2, -1)
        return (x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"theta={self.theta:g}"


def alibi(heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the bias [B|1, heads, T, S] of positions int64 [B|1, T] and [B|1, S].

    Example:
        >>> alibi(2, torch.tensor([[2]]), torch.arange(3)[None])[0, 0].tolist()
        [[-0.125, -0.0625, -0.0]]
    """
    distance = (queries[:, None, :, None] - keys[:, None, None, :]).abs()
    slopes = torch.tensor(_slopes(heads), device=keys.device)
    return -slopes[:, None, None] * distance


def _slopes(heads: int) -> list[float]:
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    between = [2 ** (-4 * h / whole) for h in range(1, 2 * (heads - whole), 2)]
    return slopes + between
