"""Causal linear recurrences, in chunks.

    S_i = diag(a_i) S_{i-1} + k_i v_i^T         [D, Dv]
    out_i = q_i S_i                             [Dv]

with a decay a_i = exp(g_i), g_i <= 0, that is none, one a head, one a head and step, or one a channel and
step. With b_i the sum of g from the start of a chunk of C positions to i, a chunk does

    out_i = sum_{j <= i} (q_i exp(b_i - b_j) . k_j) v_j + (q_i exp(b_i)) S
    S <- diag(exp(b_C)) S + sum_j (k_j exp(b_C - b_j)) v_j^T

where no exponent is positive, so that nothing overflows whatever the decay. Where the decay differs by
channel the first sum is taken by `halves.py`.

Operations O(T * (C + D) * Dv), memory O(T * C), or without autograd O(NUMBERS) beside the output.
Sources: Hua et al., 2022, arXiv 2202.10447, section 3.3; with decay, Qin et al., 2024, arXiv 2401.04658,
section 3; by channel, Yang et al., 2023, arXiv 2312.06635, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.halves import same, within_blocks
from regard.errors import RegardError, ShapeMismatch

CHUNK, LONGEST = 64, 4096
NUMBERS = {"cpu": 2**17, "cuda": 2**26}
NEVER = -1e4


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return out_i = q_i S_i for every position, and the last state.

    Sums of exponents are float64, all else float64 where `q` is and float32 otherwise.

    Args:
        q: [B, H, T, D], features of the queries.
        k: [B, Hkv, T, D], features of the keys. H is a multiple of Hkv, and consecutive query heads share
            a key head and its state.
        v: [B, Hkv, T, Dv].
        decay: g, at most 0, -inf to forget all: [Hkv], [B, Hkv, T], [B, Hkv, T, D], or None for no decay.
        state: S_0, [B, Hkv, D, Dv], or None for zero.
        valid: bool [B, T]; a position that is False writes nothing and ages nothing.
        starts: bool [B, T]; a position that is True sees nothing of what is before it (packed sequences).
        chunk: positions in a chunk, a power of two.

    Returns:
        out [B, H, T, Dv] and the state after position T, [B, Hkv, D, Dv].

    Raises:
        ShapeMismatch: where the shapes do not fit.
        RegardError: for a decay above 0, or a chunk that is no power of two.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 1)
        >>> out, state = scan(q, k, v, torch.tensor([0.5]).log())
        >>> out.flatten().tolist(), state.item()
        ([1.0, 1.5, 1.75], 1.75)
    """
    _check(q, k, v, decay, state, valid, starts, chunk)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    if state is None:
        state = q.new_zeros(batch, kv_heads, width, v.shape[3], dtype=kind)
    state = state.to(kind)
    if length == 0:
        return q.new_zeros(batch, heads, 0, v.shape[3], dtype=kind), state
    if valid is not None:
        k = k * valid[:, None, :, None]
    steady = decay is not None and decay.ndim == 1 and valid is None
    decay = _by_step(decay, length, valid)
    q = q.unflatten(1, (kv_heads, heads // kv_heads))
    size = min(chunk, _power(length))
    lengths = _lengths(length, size, q.numel() // length, q.device.type)
    parts = [_split(x, lengths, dim) for x, dim in ((q, 3), (k, 2), (v, 2), (decay, 2), (starts, 1))]
    outs = []
    for count, (q_, k_, v_, decay_, starts_) in zip(lengths, zip(*parts, strict=True), strict=True):
        steady_here = steady and count % size == 0
        piece = _Piece(q_.to(kind), k_.to(kind), v_.to(kind), decay_, starts_, steady_here)
        out, state = piece.one(state) if count == 1 else piece.chunked(state, size)
        outs.append(out)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 3)
    return out.flatten(1, 2), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, valid: Tensor | None,
    starts: Tensor | None, chunk: int,
) -> None:  # fmt: skip
    batch, heads, length, width = q.shape
    kv_heads, values = k.shape[1], v.shape[3]
    wanted: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("k", k, [(batch, kv_heads, length, width)]),
        ("v", v, [(batch, kv_heads, length, values)]),
        ("decay", decay, [(kv_heads,), (batch, kv_heads, length), (batch, kv_heads, length, width)]),
        ("state", state, [(batch, kv_heads, width, values)]),
        ("valid", valid, [(batch, length)]),
        ("starts", starts, [(batch, length)]),
    ]
    for name, x, shapes in wanted:
        if x is not None and tuple(x.shape) not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise ShapeMismatch(f"{name} is {list(x.shape)}; with q {list(q.shape)} it must be {allowed}.")
    if heads % kv_heads:
        raise ShapeMismatch(f"q has {heads} heads, which is no multiple of the {kv_heads} of k.")
    if chunk < 1 or chunk > LONGEST or chunk & (chunk - 1):
        raise RegardError(f"chunk is {chunk}; it must be a power of two, at most {LONGEST}.")
    if decay is not None and bool((decay > 0).any()):
        raise RegardError(
            "decay is above 0 somewhere, so that states would grow; it is the logarithm of a share."
        )


def _lengths(length: int, size: int, each: int, device: str) -> list[int]:
    """Lengths of pieces of about NUMBERS numbers, which a cache holds; all but the last are whole chunks."""
    whole = length // size * size
    long = max(1, NUMBERS.get(device, NUMBERS["cuda"]) // (each * size)) * size
    found = [min(long, whole - start) for start in range(0, whole, long)]
    return found + [length - whole] * (whole < length)


def _split(x: Tensor | None, lengths: list[int], dim: int) -> Sequence[Any]:
    """Cut `x` along `dim`; the gradient is put together once, where each slice would fill all of it."""
    return [None] * len(lengths) if x is None else x.split(lengths, dim)


def _power(length: int) -> int:
    """The least power of two that is no less than `length`."""
    return 1 << (length - 1).bit_length()


def _by_step(decay: Tensor | None, length: int, valid: Tensor | None) -> Tensor | None:
    """The decay as float64 [B|1, Hkv, T, D|1], 0 where a position must not age what is there."""
    if decay is None:
        return None
    decay = decay.double().clamp(min=NEVER)
    if decay.ndim == 1:
        decay = decay.view(1, -1, 1, 1).expand(-1, -1, length, -1)
    elif decay.ndim == 3:
        decay = decay[..., None]
    return decay if valid is None else decay * valid[:, None, :, None]


@dataclass
class _Piece:
    """Consecutive positions: q [B, Hkv, G, T, D], k [B, Hkv, T, D], v, decay [B|1, Hkv, T, D|1], starts.

    Where `steady`, the decay is the same at all of them, and they are whole chunks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    starts: Tensor | None
    steady: bool

    def one(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence itself, for one position."""
        if self.decay is not None:
            state = state * self.decay.exp().to(state.dtype).transpose(2, 3)
        if self.starts is not None:
            state = state * ~self.starts[:, None, :, None]
        state = state + self.k.transpose(2, 3) * self.v
        return self.q @ state[:, :, None], state

    def chunked(self, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The same in chunks of `size`, all of which but the states are computed at once."""
        length = self.k.shape[2]
        short = -length % size
        q, k, v = (_chunks(x, short, size) for x in (self.q, self.k, self.v))
        decay = self.decay[:, :, :size] if self.decay is not None and self.steady else self.decay
        ages = _Ages.of(decay, self.starts, short, size)
        near = ages.near(q, k[:, :, None], v[:, :, None])
        written, kept = ages.to_end(k).transpose(-1, -2) @ v, ages.kept(state.dtype)
        shares = [None] * k.shape[2] if kept is None else kept.expand(-1, -1, k.shape[2], -1, -1).unbind(2)
        states = []
        for added, share in zip(written.unbind(2), shares, strict=True):
            states.append(state)
            state = added + (state if share is None else state * share)
        seen = torch.stack(states, 2)[:, :, None].expand(-1, -1, q.shape[2], -1, -1, -1)
        flat = (x.flatten(0, 3) for x in (near, ages.from_start(q), seen))
        out = torch.baddbmm(*flat).view(near.shape)
        return out.flatten(3, 4)[:, :, :, :length], state


def _chunks(x: Tensor, short: int, size: int) -> Tensor:
    """Pad the positions of `x` [..., T, D] with `short` zeros and cut them into chunks, [..., N, C, D]."""
    x = F.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    return x.unflatten(-2, (-1, size))


@dataclass
class _Ages:
    """How much of what position j wrote is left at position i of the same chunk.

    Attributes:
        sums: b, float64 [B|1, Hkv, N|1, C, D|1], or None without decay.
        sequence: number of starts in the chunk up to a position, [B, 1, N, C], or None.
    """

    sums: Tensor | None
    sequence: Tensor | None

    @classmethod
    def of(cls, decay: Tensor | None, starts: Tensor | None, short: int, size: int) -> _Ages:
        sums = None if decay is None else _chunks(decay, short, size).cumsum(3)
        sequence = None
        if starts is not None:
            sequence = _chunks(starts[:, None, :, None].long(), short, size)[..., 0].cumsum(3)
        return cls(sums, sequence)

    def kept(self, dtype: torch.dtype) -> Tensor | None:
        """The share of an earlier state that is left after each chunk, [B|1, Hkv|1, N|1, D|1, 1], or None."""
        kept = None if self.sums is None else self.sums[..., -1, :, None].exp().to(dtype)
        if self.sequence is None:
            return kept
        whole = (self.sequence[..., -1] == 0)[..., None, None]
        return whole.to(dtype) if kept is None else kept * whole

    def from_start(self, q: Tensor) -> Tensor:
        """Queries [B, Hkv, G, N, C, D] as they see the state before their chunk."""
        if self.sums is not None:
            q = q * self.sums[:, :, None].exp().to(q.dtype)
        return q if self.sequence is None else q * (self.sequence == 0)[:, :, None, :, :, None]

    def to_end(self, k: Tensor) -> Tensor:
        """Keys [B, Hkv, N, C, D] as they stand in the state after their chunk."""
        if self.sums is not None:
            k = k * (self.sums[..., -1:, :] - self.sums).exp().to(k.dtype)
        return k if self.sequence is None else k * (self.sequence == self.sequence[..., -1:])[..., None]

    def near(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each position [B, Hkv, G, N, C, .] gets from the positions of its own chunk."""
        if self.sums is not None and self.sums.shape[-1] > 1:
            sums = self.sums[:, :, None].expand(*k.shape)
            sequence = None if self.sequence is None else self.sequence[:, :, None]
            return within_blocks(q, k, v, sums, sequence)
        scores = q @ k.transpose(-1, -2)
        left = self._left(scores)
        return (torch.tril(scores) if left is None else scores * left) @ v

    def _left(self, scores: Tensor) -> Tensor | None:
        """exp(b_i - b_j) for j <= i in one sequence, else 0, [B|1, Hkv|1, 1, N|1, C, C]; None for all 1."""
        if self.sums is None and self.sequence is None:
            return None
        before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if self.sequence is not None:
            before = before & same(self.sequence, self.sequence)
        if self.sums is None:
            return before.to(scores.dtype)[:, :, None]
        apart = self.sums - self.sums.transpose(-1, -2)
        return apart.masked_fill(~before, -torch.inf).to(scores.dtype).exp()[:, :, None]
