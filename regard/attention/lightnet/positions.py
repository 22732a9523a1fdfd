"""Positions on grids of one, two or three axes: MD-LRPE on queries and keys, MD-TPE on the embedding.

    MD-LRPE   q, k -> [x cos(theta p), x sin(theta p)], so that channel c of head h counts
              cos(theta_hc (p_t - p_s)), p the coordinate on the axis to which channel c belongs
    MD-TPE    out_t = sum over axes of W norm((a . b)_h sum_{s <= t on the axis} lambda_h^(t - s) x_s)

with theta, a, b, lambda = sigmoid(.), the norms and the W learned. MD-TPE takes the place of the embedding;
nothing is added to it. It smooths each axis in one direction, from its beginning on.

Source: Qin et al., 2024, arXiv 2405.21022. Status: MD-LRPE agrees with `lrpe_cosine_md_torch` and MD-TPE with
`MdTpe` of the first author's later code (Doraemonzzz/xopes, Doraemonzzz/xmixers). That class tokens pass
through MD-TPE unchanged is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.engines.scan import scan
from regard.errors import RegardError, ShapeMismatch

Angles = tuple[Tensor, Tensor]
BASE = 10000.0


def coordinates(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the coordinates of a grid's positions, row by row, int64 [prod(grid), axes].

    Example:
        >>> coordinates((2, 2)).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    axes = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def initial_angles(heads: int, width: int) -> Tensor:
    """Return angles that fall from 1 to nearly 1 / 10000, the same for each head, [heads, width]."""
    return (BASE ** (-torch.arange(width) / width)).expand(heads, width).clone()


class MDLRPE(nn.Module):
    """Relative positions for queries and keys, an angle a channel.

    Args:
        head_dim: D.
        heads: number of heads; each has angles of its own.
        axes: 1 to 3; the channels are shared out among them in order.
        strict: whether to refuse a head_dim that `axes` do not divide; otherwise the last axis has fewer.

    Example:
        >>> cos, sin = MDLRPE(head_dim=8, heads=2, axes=2)(coordinates((3, 5)))
        >>> cos.shape
        torch.Size([1, 2, 15, 8])
    """

    def __init__(self, head_dim: int, heads: int, axes: int, *, strict: bool = True) -> None:
        super().__init__()
        _check_axes(axes)
        if strict and head_dim % axes:
            raise RegardError(
                f"head_dim is {head_dim}, which {axes} axes do not divide; strict=False allows it."
            )
        self.head_dim, self.axes = head_dim, axes
        each = math.ceil(head_dim / axes)
        self.theta = nn.Parameter(initial_angles(heads, each))

    def forward(self, places: Tensor, class_tokens: int = 0) -> Angles:
        """Return cosines and sines, each [B|1, heads, class_tokens + T, D], for `lightnet_attention`.

        Args:
            places: coordinates [T, axes] or [B, T, axes]; of text, positions [T, 1].
            class_tokens: so many tokens in front have no place; they are not turned.
        """
        if places.shape[-1] != self.axes or places.ndim not in (2, 3):
            raise ShapeMismatch(f"places must be [T, {self.axes}] or [B, T, {self.axes}], and are "
                                f"{list(places.shape)}.")  # fmt: skip
        places = (places if places.ndim == 3 else places[None])[:, None]
        theta = self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        turned = [places[..., i, None] * theta[:, None] for i in range(self.axes)]
        angle = torch.cat(turned, -1)[..., : self.head_dim]
        angle = F.pad(angle, (0, 0, class_tokens, 0))
        return angle.cos(), angle.sin()


class MDTPE(nn.Module):
    """Positions in the embedding, by smoothing along every axis of the grid.

    Args:
        dim: width of x.
        heads: groups of channels with a decay of their own; they divide dim.
        axes: 1 to 3.
        eps: of the norms.

    Example:
        >>> MDTPE(dim=8, heads=2, axes=2)(torch.randn(1, 3, 5, 8)).shape
        torch.Size([1, 3, 5, 8])
    """

    def __init__(self, dim: int, heads: int, axes: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        _check_axes(axes)
        if heads < 1 or dim % heads:
            raise RegardError(f"dim is {dim}, which {heads} heads do not divide.")
        self.axes = nn.ModuleList(_Axis(dim, heads, eps) for _ in range(axes))

    def forward(self, x: Tensor, class_tokens: int = 0, grid: Sequence[int] | None = None) -> Tensor:
        """Return x with its neighbourhood in it, of the same shape.

        Args:
            x: [B, *grid, dim]; or [B, class_tokens + prod(grid), dim] where `grid` is given.
            class_tokens: so many tokens in front pass through unchanged.
            grid: sizes of the axes.
        """
        if grid is None:
            if x.ndim != len(self.axes) + 2:
                raise ShapeMismatch(f"x must be [batch, {len(self.axes)} axes, dim], and is {list(x.shape)}.")
            out: Tensor = self._over_axes(x)
            return out
        check_grid(grid, len(self.axes), x.shape[1] - class_tokens)
        front, rest = x[:, :class_tokens], x[:, class_tokens:]
        return torch.cat([front, self._over_axes(rest.unflatten(1, tuple(grid))).flatten(1, -2)], 1)

    def step(
        self, x: Tensor, state: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs of new positions of a text [B, T, dim], and the state after them.

        Args:
            x: the new positions only.
            state: what this returned before, [B, heads, 1, dim / heads]; None at the beginning.
            valid: bool [B, T], False at padding.
        """
        if len(self.axes) != 1:
            raise RegardError(
                f"only positions of one axis can be stepped through, and these have {len(self.axes)}."
            )
        axis = self.axes[0]
        assert isinstance(axis, _Axis)
        return axis.smooth(x, state, valid)

    def _over_axes(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, axis in enumerate(self.axes):
            assert isinstance(axis, _Axis)
            rows = x.movedim(i + 1, -2)
            smoothed = axis.smooth(rows.flatten(0, -3), None, None)[0]
            out = out + smoothed.view(rows.shape).movedim(-2, i + 1)
        return out


class _Axis(nn.Module):
    """The smoothing along one axis."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.a, self.b = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.decay, self.weight = nn.Parameter(torch.randn(heads)), nn.Parameter(torch.ones(dim))
        self.output = nn.Linear(dim, dim, bias=False)

    def smooth(self, x: Tensor, state: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, T, dim] of rows x, and the state after them."""
        factor = (self.a * self.b).unflatten(0, (self.heads, -1)).sum(-1)
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        ones = heads.new_ones(*heads.shape[:3], 1)
        summed, last = scan(factor[:, None, None] * ones, ones, heads, F.logsigmoid(self.decay), state,
                            valid=valid)  # fmt: skip
        normed = F.rms_norm(summed, summed.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        return self.output((normed * self.weight).to(x.dtype)), last


def check_grid(grid: Sequence[int], axes: int, length: int) -> None:
    """Refuse a grid of another number of axes or positions."""
    if len(grid) != axes or math.prod(grid) != length:
        raise ShapeMismatch(
            f"the grid {tuple(grid)} has {len(grid)} axes and {math.prod(grid)} positions; x has {length} "
            f"positions, on {axes} axes."
        )


def _check_axes(axes: int) -> None:
    if axes not in (1, 2, 3):
        raise RegardError(f"axes is {axes!r}; it must be 1, 2 or 3.")
