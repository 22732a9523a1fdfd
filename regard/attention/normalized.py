"""Normalised attention: linear attention whose normaliser is a free positive function of the input.

    u [B, T, dim] -> q, k [B, H, T, n], v [B, H, T, dim / H], eta [B, H, T] = f(W u + b)
    S_i = S_{i-1} + k_i v_i^T
    out_i = q_i S_i / eta_i,  f = exp, softplus or sigmoid;  then an output projection

In linear attention eta_i = phi(q_i) . sum_{j <= i} phi(k_j): decay eta_{i-1}/eta_i and input scale 1/eta_i
are tied to q and k. Here they are free, as they are in state-space models. Nothing keeps the weights of a row
to a sum of 1, and q and k pass through no feature map.

Source: Sieber et al., 2024, arXiv 2405.15731, section 4.2. Status: agrees with the official code
(IntelligentControlSystems/dsf-mqar, `SelfNormAttention`), which has eta = exp and one a head.
Operations O(T * n * d) a head; decoding costs O(n * d), whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.costs import CARRIES_STATE
from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.rows import normalized_attention as system_of_rows
from regard.attention.registry import Spec, mechanism
from regard.engines.scan import scan
from regard.errors import RegardError, ShapeMismatch

ETAS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
}


def normalized_attention(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, *, eta: str = "exp", state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return out_i = 1/eta_i sum_{j <= i} (q_i . k_j) v_j, and the state after the last position.

    Args:
        q, k: [B, H, T, n].
        v: [B, H, T, d].
        logits: [B, H, T], what `eta` is made from.
        eta: `exp`, `softplus` or `sigmoid`.
        state: what this returned for the positions before, [B, H, n, d]; None at the beginning.

    Returns:
        out [B, H, T, d] in the dtype of v, and the state, float64 where q is and float32 otherwise.

    Raises:
        RegardError: for an eta that is not known.
        ShapeMismatch: where the tensors do not fit together.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 2)
        >>> out, state = normalized_attention(q, k, v, torch.zeros(1, 1, 3))
        >>> out[0, 0, :, 0].tolist()
        [2.0, 4.0, 6.0]
    """
    _check_eta(eta)
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != q.shape[:3] or logits.shape != q.shape[:3]:
        raise ShapeMismatch(
            f"q and k must be [B, H, T, n], v [B, H, T, d] and logits [B, H, T]; they are {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)} and {list(logits.shape)}."
        )
    if state is not None and state.shape != (*q.shape[:2], q.shape[3], v.shape[3]):
        raise ShapeMismatch(
            f"the state must be {[*q.shape[:2], q.shape[3], v.shape[3]]}, and is {list(state.shape)}."
        )
    out, last = scan(q, k, v, state=state)
    return (out / ETAS[eta](logits.to(out.dtype))[..., None]).to(v.dtype), last


class NormalizedAttentionLayer(Block):
    """Normalised attention with its projections; the module of `NormalizedAttention`."""

    causal = True

    def __init__(self, dim: int, heads: int, key_width: int | None, eta: str) -> None:
        super().__init__()
        self.heads, self.eta = heads, eta
        width = key_width if key_width is not None else dim // heads
        self.queries, self.keys = nn.Linear(dim, heads * width), nn.Linear(dim, heads * width)
        self.values, self.normaliser = nn.Linear(dim, dim), nn.Linear(dim, heads)
        self.output = nn.Linear(dim, dim)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k [B, H, T, n], v [B, H, T, d] and the logits of eta [B, H, T]."""
        _check_input(x, self.values.in_features)
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        return q, k, v, self.normaliser(x).transpose(1, 2)

    def mix(self, x: Tensor) -> Tensor:
        """Return the heads' outputs before the output projection, [B, H, T, d]."""
        return normalized_attention(*self.parts(x), eta=self.eta)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, None)[0]

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        Args:
            x: the new positions only, [B, T, dim].
            state: what this returned before, [B, H, n, d]; None at the beginning.
        """
        heads, last = normalized_attention(*self.parts(x), eta=self.eta, state=state)
        return self.output(heads.transpose(1, 2).flatten(2)), last

    def reference(self, x: Tensor) -> Tensor:
        q, k, v, logits = self.parts(x)
        weights = torch.tril(q @ k.transpose(-1, -2)) / ETAS[self.eta](logits)[..., None]
        return self.output((weights @ v).transpose(1, 2).flatten(2))

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.values.in_features, generator=generator, dtype=torch.float64)


@system_of(NormalizedAttentionLayer)
def system(mixer: NormalizedAttentionLayer, x: Tensor) -> tuple[LTV, Tensor]:
    """Return the heads as linear time-varying systems, and their values."""
    q, k, v, logits = mixer.parts(x)
    return system_of_rows(q, k, ETAS[mixer.eta](logits), v.shape[-1]), v


@mechanism("normalized")
@dataclass(frozen=True, kw_only=True)
class NormalizedAttention(Spec):
    """Linear attention with a normaliser of its own; a causal layer from x to x.

    Attributes:
        dim: width of x.
        heads: number of heads; it divides dim.
        key_width: n, width of queries and keys a head; None for dim / heads.
        eta: the normaliser, `exp`, `softplus` or `sigmoid` of a linear function of x.

    Example:
        >>> layer = NormalizedAttention(dim=32, heads=4).build()
        >>> x = torch.randn(2, 9, 32)
        >>> first, state = layer.step(x[:, :5])
        >>> rest, state = layer.step(x[:, 5:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    module: ClassVar = NormalizedAttentionLayer
    costs: ClassVar = CARRIES_STATE
    dim: int
    heads: int
    key_width: int | None = None
    eta: str = "exp"

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        given = {"dim": self.dim, "heads": self.heads, "key_width": self.key_width}
        for name, value in given.items():
            if value is None and name == "key_width":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.dim % self.heads:
            raise RegardError(f"dim is {self.dim}, which {self.heads} heads do not divide.")

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return *(cls(dim=12, heads=3, key_width=5, eta=eta) for eta in ETAS), cls(dim=8, heads=2)


def _check_eta(eta: str) -> None:
    if eta not in ETAS:
        raise RegardError(f"eta is {eta!r}; it must be one of {', '.join(ETAS)}.")


def _check_input(x: Tensor, dim: int) -> None:
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ShapeMismatch(f"x must be [batch, time, {dim}], and is {list(x.shape)}.")
