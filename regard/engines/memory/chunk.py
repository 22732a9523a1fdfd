"""One chunk of a neural memory: all positions at once, with gradients taken at one set of weights.

    S_t = eta_t S_{t-1} - theta_t h_t^T d_t             surprise, with the rank-one gradient of position t
    W_t = (1 - alpha_t) W_{t-1} + S_t                   weights of a layer
    out_t = M_t(q_t)

From the start of the chunk, with m_t the product of eta up to t, beta_t that of 1 - alpha, and

    N[t, j] = theta_j eta_{j+1} .. eta_t                what surprise t holds of gradient j <= t
    B[t, i] = (1 - alpha_{i+1}) .. (1 - alpha_t)        what weights t hold of surprise i <= t
    G = B N,   f = B m

the weights are W_t = beta_t W + f_t S - sum_j G[t, j] h_j^T d_j. They are never formed: a layer that reads
with rows r is  beta * (r W) + f * (r S) - ((r h^T) * G) d.

Products are sums of logarithms in float64, differences at most 0, so that gates of 0 and 1 give no NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.memory.network import ACTIVATIONS, Weights, gradient

TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Shares:
    """The coefficients above for chunks of C positions.

    Attributes:
        written: G, [..., C, C].
        surprised: N, [..., C, C].
        kept: beta, [..., C, 1].
        moved: f, [..., C, 1], or None without momentum.
        carried: m at the last position, [..., 1, 1], or None without momentum.
    """

    written: Tensor
    surprised: Tensor
    kept: Tensor
    moved: Tensor | None
    carried: Tensor | None

    @classmethod
    def of(
        cls, theta: Tensor, alpha: Tensor | None, eta: Tensor | None, here: Tensor | None = None
    ) -> Shares:
        """Return them from gates [..., C].

        Args:
            here: bool [..., C], False where nothing may be written or aged; None for everywhere. Gates are
                neutral there already, and what this adds is that the surprise does not move the weights.
        """
        size = theta.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=theta.device).triu(1)
        if eta is None:
            surprised, moves = torch.diag_embed(theta), None
        else:
            surprised, moves = _products(eta, later)
            surprised = surprised * theta[..., None, :]
        if alpha is None:
            held, kept = (~later).to(theta.dtype), torch.ones_like(theta)[..., None]
        else:
            held, kept = _products(1 - alpha.double(), later)
            held, kept = held.to(theta.dtype), kept.to(theta.dtype)
        held = held if here is None else held * here[..., None, :]
        moved = None if moves is None else held @ moves
        carried = None if moves is None else moves[..., -1:, :]
        return cls(held @ surprised, surprised, kept, moved, carried)

    def split(self) -> list[Shares]:
        """Return one for each index of the third dimension."""
        fields = (self.written, self.surprised, self.kept, self.moved, self.carried)
        parts = [None if x is None else x.unbind(2) for x in fields]
        count = self.written.shape[2]
        return [Shares(*(None if p is None else p[i] for p in parts)) for i in range(count)]  # type: ignore[arg-type]


def _products(share: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """Products of shares [..., C]: after j up to t, [..., C, C], 0 for j > t; from the start, [..., C, 1]."""
    sums = share.double().clamp(min=TINY).log().cumsum(-1)
    apart = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf)
    return apart.to(share.dtype).exp(), sums.to(share.dtype).exp()[..., None]


def one_chunk(
    q: Tensor, k: Tensor, v: Tensor, shares: Shares, start: Weights, weights: Weights, surprise: Weights,
    activation: str, second_order: bool,
) -> tuple[Tensor, Weights, Weights]:  # fmt: skip
    """Return the outputs of positions of one chunk, and weights and surprise after them.

    Args:
        q, k, v: [B, H, C, in], [B, H, C, in], [B, H, C, out].
        start: the weights at which all gradients are taken.
        weights, surprise: before the first of the positions.
        second_order: whether gradients pass through the gradients.
    """
    inputs, deltas = gradient(start, k, v, activation)
    if not second_order:
        inputs, deltas = [h.detach() for h in inputs], [d.detach() for d in deltas]
    act, rows = ACTIVATIONS[activation][0], q
    after, moved = [], []
    for layer, (weight, h, d) in enumerate(zip(weights, inputs, deltas, strict=True)):
        rows = act(rows) if layer else rows
        seen = shares.kept * (rows @ weight) - ((rows @ h.mT) * shares.written) @ d
        new = shares.kept[..., -1:, :] * weight - (h * shares.written[..., -1, :, None]).mT @ d
        if shares.moved is not None and shares.carried is not None:
            seen = seen + shares.moved * (rows @ surprise[layer])
            new = new + shares.moved[..., -1:, :] * surprise[layer]
            carried = shares.carried * surprise[layer] - (h * shares.surprised[..., -1, :, None]).mT @ d
            moved.append(carried)
        rows = seen
        after.append(new)
    return rows, tuple(after), tuple(moved)
