"""What generates the gate of a NiNformer: a small MLP-Mixer, the Fourier transform, or a module of one's own.

    mixer     m = z + T(LN z),  v = m + C(LN m)
              T: N -> h, GELU, h -> N over the tokens of each channel;  C: d -> h, GELU, h -> d of each token
    fourier   v = Re F_N(F_d(z)), the transform over channels and then over tokens; no parameters

z and v are [B, N, d]; dropout follows every GELU and every second Linear. Parameters of the mixer have the
official names. Padded tokens are zeroed after the first LN, so that T reads nothing of them.

Source: Abdullah and Aydin, 2024, arXiv 2403.02411, section 3; the Fourier variant is the authors' own,
Fourier_NiNformer. Status: agrees with the official code of both by running them. Zeroed padding and
`resize_tokens` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError

Grid = tuple[int, int]
Generator = str | Callable[[int, int], nn.Module]
MODES = ("bicubic", "bilinear", "nearest")


class FeedForward(nn.Module):
    """Linear, GELU, dropout, Linear, dropout over the last axis."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear maps."""
        first, second = self.net[0], self.net[3]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return first, second


class Transpose(nn.Module):
    """Swap the last two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Mixer(nn.Module):
    """The mixer that generates the gate, [B, N, d] to [B, N, d].

    Args:
        dim: d.
        tokens: N.
        hidden: width of C inside.
        token_hidden: width of T inside.
        dropout: share dropped in training.
    """

    def __init__(self, dim: int, tokens: int, hidden: int, token_hidden: int, dropout: float) -> None:
        super().__init__()
        over_tokens, over_channels = (
            FeedForward(tokens, token_hidden, dropout),
            FeedForward(dim, hidden, dropout),
        )
        self.token_mix = nn.Sequential(nn.LayerNorm(dim), Transpose(), over_tokens, Transpose())
        self.channel_mix = nn.Sequential(nn.LayerNorm(dim), over_channels)

    def forward(self, z: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return v; valid is bool [B, N], False at padding, which T then does not read."""
        norm, to_channels, over_tokens, back = self.token_mix
        normed = norm(z)
        if valid is not None:
            normed = normed * valid[..., None]
        mixed = z + back(over_tokens(to_channels(normed)))
        out: Tensor = mixed + self.channel_mix(mixed)
        return out

    def resized(self, old: Grid, new: Grid, prefix: int, mode: str) -> None:
        """Interpolate T from an old grid to a new one, in place; `prefix` tokens in front keep their weights.

        Weights that read tokens are divided by how many times more there are, so that sums keep their size.
        """
        over_tokens = self.token_mix[2]
        assert isinstance(over_tokens, FeedForward)
        first, second = over_tokens.linears
        share = math.prod(old) / math.prod(new)
        with torch.no_grad():
            first.weight = nn.Parameter(_resized(first.weight, old, new, prefix, mode, share))
            second.weight = nn.Parameter(_resized(second.weight.mT, old, new, prefix, mode).mT.contiguous())
            second.bias = nn.Parameter(_resized(second.bias[None], old, new, prefix, mode)[0])
        first.in_features = second.out_features = prefix + math.prod(new)


def _resized(x: Tensor, old: Grid, new: Grid, prefix: int, mode: str, share: float = 1.0) -> Tensor:
    """Rows over tokens [rows, prefix + H W], on the new grid."""
    plane = x[:, prefix:].unflatten(1, old)[:, None]
    smooth = {} if mode == "nearest" else {"align_corners": False}
    kind = torch.promote_types(x.dtype, torch.float32)
    grown = F.interpolate(plane.to(kind), size=new, mode=mode, **smooth).flatten(1)
    return torch.cat([x[:, :prefix], share * grown.to(x.dtype)], 1)


class Fourier(nn.Module):
    """The real part of the transform over channels and tokens, [B, N, d] to [B, N, d]."""

    def forward(self, z: Tensor) -> Tensor:
        kind = torch.promote_types(z.dtype, torch.float32)
        return torch.fft.fft2(z.to(kind)).real.to(z.dtype)


def generator_of(
    given: Generator, dim: int, tokens: int, hidden: int, token_hidden: int, dropout: float
) -> nn.Module:
    """Return what generates the gate.

    Args:
        given: "mixer", "fourier", or a function of d and N that returns a module from [B, N, d] to [B, N, d].

    Raises:
        RegardError: for another name, or where the function returns no module.
    """
    if given == "mixer":
        return Mixer(dim, tokens, hidden, token_hidden, dropout)
    if given == "fourier":
        return Fourier()
    if not callable(given):
        raise RegardError(
            f"generator is {given!r}; it must be 'mixer', 'fourier' or a function of dim and tokens."
        )
    made = given(dim, tokens)
    if not isinstance(made, nn.Module):
        raise RegardError(f"generator returned a {type(made).__name__}; it must return a module.")
    return made
