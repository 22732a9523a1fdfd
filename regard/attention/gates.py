"""Gates of heads: how much of what each head says goes on, from the input of the attention layer.

    G(x) [B, T, H]:  linear  w_h . x_h + b_h                 x_h the head's slice of x, dim / H wide
                     mlp     w_h . relu(W_h x_h + c_h) + b_h     with dim / 4H hidden units
                     joint   W x + b                         every head reads the whole of x
                     constant  b_h                           whatever x is
    gate = factor * sigmoid(G(x))

Source: Bondarenko et al., 2023, arXiv 2306.12929, section 4.2. Status: agrees with the official code
(Qualcomm-AI-research/outlier-free-transformers), except that `start` is heeded by all four kinds, and there
by `linear` alone; `start=None` is theirs for the others.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch

GateKind = Literal["linear", "mlp", "joint", "constant"]
SMALL = 0.001


class HeadGate(nn.Module):
    """A gate for every head and position, from 0 to `factor`.

    Args:
        dim: width of x.
        heads: number of heads.
        kind: see above.
        start: the gate at the beginning, between 0 and 1, by the last bias; None leaves the bias as drawn.
        pooled: average G over positions, one gate a head and sequence; it looks ahead.
        fine_tune: for a model that is trained already: weights start small and the gate is divided by
            `start`, so that it begins at 1.

    Attributes:
        factor: 1, or 1 / `start` where `fine_tune`.

    Raises:
        RegardError: where an option is out of range, or the heads do not divide dim.

    Example:
        >>> gate = HeadGate(32, heads=4, start=0.25)
        >>> gate(torch.zeros(2, 5, 32)).shape, round(gate(torch.zeros(1, 1, 32)).mean().item(), 3)
        (torch.Size([2, 4, 5, 1]), 0.25)
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kind: GateKind = "linear",
        start: float | None = 0.5,
        pooled: bool = False,
        fine_tune: bool = False,
    ) -> None:
        super().__init__()
        check_gate(dim, heads, kind, start, fine_tune)
        self.dim, self.heads, self.kind, self.pooled = dim, heads, kind, pooled
        self.factor = 1 / start if fine_tune and start is not None else 1.0
        width = dim if kind == "joint" else dim // heads
        if kind == "mlp":
            hidden = max(1, width // 4)
            self.inner = nn.Parameter(_drawn((heads, width, hidden), width))
            self.inner_bias = nn.Parameter(_drawn((heads, hidden), width))
            width = hidden
        if kind != "constant":
            self.weight = nn.Parameter(_drawn((heads, width), width))
            if fine_tune:
                nn.init.normal_(self.weight, std=SMALL)
        self.bias = nn.Parameter(_drawn((heads,), width) if kind != "constant" else torch.zeros(heads))
        if start is not None:
            nn.init.constant_(self.bias, math.log(start / (1 - start)))

    def logits(self, x: Tensor) -> Tensor:
        """Return G(x), [B, T, H], or [B, 1, H] where pooled."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ShapeMismatch(f"x must be [batch, time, {self.dim}], and is {list(x.shape)}.")
        if self.kind == "constant":
            found = self.bias.expand(*x.shape[:2], -1)
        elif self.kind == "joint":
            found = nn.functional.linear(x, self.weight, self.bias)
        else:
            each = x.unflatten(-1, (self.heads, -1))
            if self.kind == "mlp":
                each = torch.einsum("bthd,hdm->bthm", each, self.inner).add(self.inner_bias).relu()
            found = (each * self.weight).sum(-1) + self.bias
        return found.mean(1, keepdim=True) if self.pooled else found

    def forward(self, x: Tensor) -> Tensor:
        """Return the gates of x [B, T, dim], [B, H, T or 1, 1]."""
        return self.factor * torch.sigmoid(self.logits(x)).transpose(1, 2)[..., None]

    def extra_repr(self) -> str:
        pooled = ", pooled=True" if self.pooled else ""
        return f"{self.dim}, heads={self.heads}, kind={self.kind!r}, factor={self.factor:g}{pooled}"


def check_gate(dim: int, heads: int, kind: str, start: float | None, fine_tune: bool) -> None:
    """Refuse options of a gate that do not fit together."""
    for name, value in (("dim", dim), ("heads", heads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if kind not in get_args(GateKind):
        raise RegardError(f"kind is {kind!r}; it must be one of {', '.join(get_args(GateKind))}.")
    if kind in ("linear", "mlp") and dim % heads:
        raise RegardError(
            f"dim is {dim}, which {heads} heads do not divide; a gate of kind {kind!r} reads the head's "
            "slice of x, and 'joint' reads all of it."
        )
    if start is not None and not 0 < start < 1:
        raise RegardError(f"start is {start}; it must lie between 0 and 1.")
    if fine_tune and start is None:
        raise RegardError("fine_tune divides the gate by start, so start must be a number.")


def _drawn(shape: tuple[int, ...], width: int) -> Tensor:
    """Uniform numbers, as nn.Linear draws them for inputs of a width."""
    bound = 1 / math.sqrt(width)
    return torch.empty(shape).uniform_(-bound, bound)
