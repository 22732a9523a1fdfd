"""LightNet's additive recurrence: a softmax of the keys over the sequence, channel by channel.

    z_t = log sum_{s <= t} exp(k_s)                                 [D], z before the first position is -inf
    S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T   [D, Dv]
    out_t = scale * q_t S_t                                         [Dv]
    out = scale * q (softmax_T(k)^T v)                              without causal order, one product

The decay comes from a running sum, not from a product of gates, so it telescopes: against any reference m

    out_t = scale * (q_t / g_t) . sum_{s <= t} exp(k_s - m) v_s^T,   g_t = sum_{s <= t} exp(k_s - m)

which is a scan without decay. It is safe where no g_t is tiny, that is, where no channel's largest key so
far grows by more than `GROWTH` within a piece. A piece where one does is halved, and at `SMALLEST` positions
or fewer it takes the form with decays, in which no exponent is positive whatever the keys.

Source: Qin et al., 2024, arXiv 2405.21022; the two forms in pieces are our choice. Sums and states are
float32, or float64 where q is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.gated import gated_scan
from regard.engines.scan import scan

State = tuple[Tensor, Tensor]
GROWTH = {torch.float32: 30.0, torch.float64: 300.0}
LEAST = {torch.float32: 1e-22, torch.float64: 1e-147}
TINY = {torch.float32: 1e-35, torch.float64: 1e-300}
LONGEST, SMALLEST = {"cpu": 2**10, "cuda": 2**14}, 512
NOTHING = -1e30


@dataclass
class Piece:
    """Consecutive positions.

    Attributes:
        q: [B, H, T, D].
        k: logits, float32 or float64 [B, Hkv, T, D], `NOTHING` at padding.
        v: [B, Hkv, T, Dv].
        valid: bool [B, T], or None.
        angles: cosines and sines, each [1|B, Hkv, T, D], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Number of positions."""
        return int(self.k.shape[2])

    def split(self, size: int) -> list[Piece]:
        """Cut it into pieces of `size` positions; the last may be shorter."""
        parts = [x.split(size, 2) for x in (self.q, self.k, self.v)]
        count = len(parts[0])
        valid = [None] * count if self.valid is None else self.valid.split(size, 1)
        angles = [None] * count
        if self.angles is not None:
            angles = list(zip(*(x.split(size, 2) for x in self.angles), strict=True))  # type: ignore[arg-type]
        return [Piece(*found) for found in zip(*parts, valid, angles, strict=True)]


def piece_of(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, angles: tuple[Tensor, Tensor] | None = None
) -> Piece:
    """Return all positions as one piece, float64 where q is and float32 otherwise."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(kind)
    if k.numel() and bool(k.detach().amin() < NOTHING):
        k = k.clamp(min=NOTHING)
    if valid is not None:
        k = k.masked_fill(~valid[:, None, :, None], NOTHING)
    return Piece(q.to(kind), k, v.to(kind), valid, angles)


def empty(q: Tensor, k: Tensor, v: Tensor, angles: bool) -> State:
    """Return the state before the first position."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, _, width = k.shape
    rows = 2 * width if angles else width
    state = k.new_zeros(batch, heads, rows, v.shape[3], dtype=kind)
    return state, k.new_full((batch, heads, width), NOTHING, dtype=kind)


def absorb(piece: Piece, state: State) -> State:
    """Return the state after all positions, at once."""
    S, before = state
    if piece.length == 0:
        return state
    top = _something(torch.maximum(piece.k.detach().amax(2), before.detach()))
    keys = _weights(piece.k - top[:, :, None], TINY)
    share = _weights(before - top, TINY)
    total = keys.sum(2) + share
    memory = doubled(keys, piece.angles).transpose(2, 3) @ piece.v
    memory = memory + S * _twice(share, piece.angles)[..., None]
    counted = torch.where(total > 0, total, 1.0)
    z = torch.where(total > 0, top + counted.log(), NOTHING)
    return memory / _twice(counted, piece.angles)[..., None], z


def run(piece: Piece, state: State, factorise: bool = True) -> tuple[Tensor, State]:
    """Return q_t S_t at every position, [B, H, T, Dv], and the last state.

    Args:
        factorise: whether to leave out decays where that is safe.
    """
    longest = LONGEST.get(piece.k.device.type, LONGEST["cuda"])
    if piece.length > longest:
        outs = []
        for part in piece.split(longest):
            out, state = run(part, state, factorise)
            outs.append(out)
        return torch.cat(outs, 2), state
    if not factorise:
        return decaying(piece, state)
    top = torch.maximum(piece.k.detach().amax(2), state[1].detach())
    if float((top - _floor(piece, state[1].detach())).amax()) <= GROWTH[piece.k.dtype]:
        return factorised(piece, state, top)
    if piece.length <= SMALLEST:
        return decaying(piece, state)
    half = 1 << ((piece.length - 1).bit_length() - 1)
    first, second = piece.split(half)
    one, state = run(first, state)
    other, state = run(second, state)
    return torch.cat([one, other], 2), state


def _floor(piece: Piece, z: Tensor) -> Tensor:
    """A bound from below of z at the first position of a piece that counts, [B, Hkv, D]."""
    first = piece.k[:, :, 0]
    if piece.valid is not None:
        at = piece.valid.int().argmax(1)[:, None, None, None]
        first = piece.k.gather(2, at.expand(-1, *piece.k.shape[1:2], 1, piece.k.shape[3]))[:, :, 0]
    return torch.maximum(first.detach(), z)


def factorised(piece: Piece, state: State, top: Tensor) -> tuple[Tensor, State]:
    """The form without decays, everything relative to `top`."""
    S, before = state
    nothing = top <= NOTHING / 2
    holes = piece.valid is not None or bool(nothing.any())
    top = _something(top)
    keys, share = _weights(piece.k - top[:, :, None], LEAST), _weights(before - top, LEAST)
    total = keys.cumsum(2) + share[:, :, None]
    if holes:
        total = torch.where(total > 0, total, 1.0)
    q = _grouped(piece.q, total.shape[1]) / total[:, :, None]
    q, keys = doubled(q, piece.angles, 1), doubled(keys, piece.angles)
    out, last = scan(q.flatten(1, 2), keys, piece.v, state=S * _twice(share, piece.angles)[..., None])
    end = total[:, :, -1]
    z = (top + end.log()).masked_fill(nothing, NOTHING)
    return out, (last / _twice(end, piece.angles)[..., None], z)


def decaying(piece: Piece, state: State) -> tuple[Tensor, State]:
    """The form with decays, everything relative to the detached z of its own position.

    Relative to it the sum of weights is 1 at every position; under autograd it is divided by all the same,
    because its gradient is that of z.
    """
    S, before = state
    z = running(piece.k.detach(), before.detach())
    earlier = torch.cat([before.detach()[:, :, None], z[:, :, :-1]], 2)
    keys = _weights(piece.k - _something(z), TINY)
    decay = torch.where(earlier > NOTHING / 2, earlier - z, 0.0).clamp(max=0)
    q, end = piece.q, None
    if torch.is_grad_enabled() and (piece.k.requires_grad or before.requires_grad):
        share = _weights(before - _something(before.detach()), TINY)
        flat = (x.flatten(0, 1) for x in (decay.exp(), keys, share))
        total = gated_scan(*flat)[0].unflatten(0, keys.shape[:2])
        total = torch.where(total > 0, total, 1.0)
        q, S = _grouped(q, total.shape[1]) / total[:, :, None], S * _twice(share, piece.angles)[..., None]
        q, end = q.flatten(1, 2), total[:, :, -1]
    q = doubled(_grouped(q, keys.shape[1]), piece.angles, 1).flatten(1, 2)
    keys, decay = doubled(keys, piece.angles), _twice(decay, piece.angles)
    out, last = scan(q, keys, piece.v, decay, S)
    if end is None:
        return out, (last, z[:, :, -1])
    return out, (last / _twice(end, piece.angles)[..., None], z[:, :, -1] + end.log())


def running(k: Tensor, before: Tensor) -> Tensor:
    """Return z at every position, [B, Hkv, T, D], from logits and the z before them."""
    top = torch.maximum(k.amax(2), before)
    floor = torch.maximum(k[:, :, 0], before)
    if float((top - floor).amax()) <= GROWTH[k.dtype]:
        sums = (k - top[:, :, None]).exp_().cumsum(2).add_((before - top).exp()[:, :, None])
        return sums.log_().add_(top[:, :, None])
    return torch.cat([before[:, :, None], k], 2).logcumsumexp(2)[:, :, 1:]


def doubled(x: Tensor, angles: tuple[Tensor, Tensor] | None, groups: int = 0) -> Tensor:
    """Return [x cos, x sin], of twice the width; x itself where there are no angles.

    Args:
        groups: 1 where x is [B, Hkv, G, T, D].
    """
    if angles is None:
        return x
    cos, sin = (a[:, :, None] if groups else a for a in angles)
    return torch.cat([x * cos, x * sin], -1)


def _twice(x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if angles is None else torch.cat([x, x], -1)


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[B, H, T, D] as [B, Hkv, G, T, D]."""
    return q.unflatten(1, (kv_heads, q.shape[1] // kv_heads))


def _something(z: Tensor) -> Tensor:
    """A reference that nothing is small against: 0 in place of `NOTHING`."""
    return torch.where(z > NOTHING / 2, z, 0.0)


def _weights(exponents: Tensor, least: dict[torch.dtype, float]) -> Tensor:
    """exp, and 0 where it is so small that it cannot count, or would slow the processor down."""
    return F.threshold(exponents.exp(), least[exponents.dtype], 0.0)
