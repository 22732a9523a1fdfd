"""A neural memory over a sequence: pieces of chunks, whole chunks, single positions.

Chunks lie on a grid that begins with a memory's first position. A sequence that is cut anywhere goes on in
the middle of its chunk, since the state holds the weights that the chunk began with; the outputs are those of
the whole.

Source: Behrouz et al., 2024, arXiv 2501.00663, section 3. Operations O(T * P) a head with P weights, for the
passes of every position through the network; the state is 2 or 3 P, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from regard.engines.memory.chunk import Shares, one_chunk
from regard.engines.memory.linear import linear_blocks
from regard.engines.memory.network import ACTIVATIONS, Weights
from regard.engines.memory.state import Memory, refuse_diverged
from regard.errors import RegardError, ShapeMismatch

BLOCK, NUMBERS = 64, 2**18


def neural_memory(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor | None = None, eta: Tensor | None = None,
    *, weights: Weights | None = None, memory: Memory | None = None, chunk: int | None = 1,
    activation: str = "silu", filled: Tensor | None = None, second_order: bool = True,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Return M_t(q_t) for every position, and the memory after the last.

        S_t = eta_t S_{t-1} - theta_t grad |M'(k_t) - v_t|^2,   M_t = (1 - alpha_t) M_{t-1} + S_t

    with M' the memory at the start of the chunk of t. Computed in float64 where `q` is, else in float32.

    Args:
        q, k: [B, H, T, n].
        v: [B, H, T, d].
        theta: step sizes, [B, H, T], from 0.
        alpha: forgetting, [B, H, T], in [0, 1]; None for none.
        eta: momentum, [B, H, T], in [0, 1]; None for none.
        weights: the memory at first, one tensor a layer, [H, in, out], where there is no `memory`; None for
            one matrix of zeros.
        memory: what this returned for the positions before.
        chunk: positions between two points at which gradients are taken; 1 is the exact recurrence; None for
            gradients at the first weights always.
        activation: between the memory's layers, `silu` or `gelu`.
        filled: int64 [B], how many of the T positions count; the others, after them, change nothing.
        second_order: whether gradients pass through the memory's gradients.

    Returns:
        out [B, H, T, d] and the memory.

    Raises:
        ShapeMismatch: where the tensors do not fit together.
        RegardError: for a chunk below 1, numbers that are not finite, or a memory that diverges.

    Example:
        >>> k = torch.eye(2)[None, None]
        >>> v = torch.tensor([[3.0], [5.0]])[None, None]
        >>> out, memory = neural_memory(k, k, v, torch.full((1, 1, 2), 0.5))
        >>> out.flatten().tolist(), memory.weights[0].flatten().tolist()
        ([3.0, 5.0], [3.0, 5.0])
    """
    _check(q, k, v, {"theta": theta, "alpha": alpha, "eta": eta}, chunk, activation, filled)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, theta = (x.to(kind) for x in (q, k, v, theta))
    alpha, eta = (None if x is None else x.to(kind) for x in (alpha, eta))
    batch, heads, length, width = q.shape
    if memory is None:
        weights = (q.new_zeros(heads, width, v.shape[3]),) if weights is None else weights
        _check_weights(weights, heads, width, v.shape[3])
        memory = Memory.fresh(tuple(w.to(kind) for w in weights), batch, eta is not None)
    memory.check(batch, heads)
    _check_kept(memory, eta)
    if filled is not None:
        here = torch.arange(length, device=q.device) < filled[:, None]
        theta, alpha = theta * here[:, None], None if alpha is None else alpha * here[:, None]
        eta = None if eta is None else torch.where(here[:, None], eta, 1.0)
    given = _Given(q, k, v, theta, alpha, eta, None if filled is None else here[:, None].expand_as(theta))
    return _Drive(chunk, activation, second_order).run(given, filled, memory)


@dataclass(frozen=True, eq=False)
class _Given:
    """Positions: q, k, v [B, H, T, .], gates [B, H, T], and which positions count."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    alpha: Tensor | None
    eta: Tensor | None
    here: Tensor | None = None

    def cut(self, start: int, stop: int) -> _Given:
        return _Given(*(None if x is None else x[:, :, start:stop] for x in vars(self).values()))  # type: ignore[arg-type]

    def chunked(self, size: int) -> _Given:
        return _Given(*(None if x is None else x.unflatten(2, (-1, size)) for x in vars(self).values()))  # type: ignore[arg-type]

    def shares(self) -> Shares:
        return Shares.of(self.theta, self.alpha, self.eta, self.here)


class _Drive:
    """Takes a sequence through its chunks, and keeps the largest weight after each."""

    def __init__(self, chunk: int | None, activation: str, second_order: bool) -> None:
        self.chunk, self.activation, self.second_order = chunk, activation, second_order
        self.peaks: list[Tensor] = []
        self.positions: list[int] = []

    def run(self, given: _Given, filled: Tensor | None, memory: Memory) -> tuple[Tensor, Memory]:
        length = given.q.shape[2]
        phase = memory.seen if self.chunk is None else memory.seen % self.chunk
        parts, at = [given.v[:, :, :0]], 0
        for count in self._counts(length, phase, filled):
            left = None if filled is None else (filled - at).clamp(0, count)
            out, memory = self._piece(given.cut(at, at + count), left, memory, at)
            parts.append(out)
            at += count
        refuse_diverged(self.peaks, self.positions)
        return torch.cat(parts, 2), memory

    def _counts(self, length: int, phase: Tensor, filled: Tensor | None) -> list[int]:
        """Lengths of pieces: up to the end of the present chunk, whole chunks, the rest."""
        if length <= 1:
            return [1] * length
        if self.chunk is not None and bool((phase != phase[0]).any()):
            return [1] * length
        if self.chunk is None:
            return [min(BLOCK, length - at) for at in range(0, length, BLOCK)]
        first = min(length, -int(phase[0]) % self.chunk)
        whole = (length - first) // self.chunk * self.chunk
        return [n for n in (first, whole, length - first - whole) if n]

    def _piece(self, given: _Given, filled: Tensor | None, memory: Memory, at: int) -> tuple[Tensor, Memory]:
        count = given.q.shape[2]
        if self.chunk is None or count < self.chunk or count == 1:
            return self._within(given, given.shares(), filled, memory, at + count)
        linear = len(memory.weights) == 1 and self.second_order
        loose = filled is None or self.chunk == 1
        size = self.chunk * max(1, BLOCK // self.chunk) if linear and loose else self.chunk
        batch, heads = given.q.shape[:2]
        several = max(1, NUMBERS // (batch * heads * size * size)) * size
        cuts = [*range(0, count // size * size, several), count // size * size]
        pieces = [(a, b, size) for a, b in pairwise(cuts)]
        if cuts[-1] < count:
            pieces.append((cuts[-1], count, count - cuts[-1]))
        outs = []
        for start, stop, each in pieces:
            left = None if filled is None else (filled - start).clamp(0, stop - start)
            walk = self._linear if linear else self._chunks
            out, memory = walk(given.cut(start, stop).chunked(each), left, memory, at + start)
            outs.append(out.flatten(2, 3))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2), memory

    def _within(
        self, given: _Given, shares: Shares, filled: Tensor | None, memory: Memory, at: int
    ) -> tuple[Tensor, Memory]:
        """Positions of one chunk."""
        out, weights, surprise = one_chunk(
            given.q, given.k, given.v, shares, memory.start, memory.weights, memory.surprise, self.activation,
            self.second_order,
        )  # fmt: skip
        seen = memory.seen + (given.q.shape[2] if filled is None else filled)
        start = memory.start
        if self.chunk is not None:
            full = (seen % self.chunk == 0) & (seen > memory.seen)
            start = _where(full, weights, start)
        self._note([w.detach().abs().amax() for w in weights], at)
        return out, Memory(seen, start, weights, surprise)

    def _chunks(self, given: _Given, filled: Tensor | None, memory: Memory, at: int) -> tuple[Tensor, Memory]:
        """Whole chunks [B, H, N, C, .], one after the other."""
        size, outs = given.q.shape[3], []
        shares = given.shares().split()
        rows = zip(given.q.unbind(2), given.k.unbind(2), given.v.unbind(2), shares, strict=True)
        for number, (q, k, v, share) in enumerate(rows):
            left = None if filled is None else (filled - number * size).clamp(0, size)
            piece = _Given(q, k, v, given.theta[:, :, number], None, None)
            out, memory = self._within(piece, share, left, memory, at + (number + 1) * size)
            outs.append(out)
        return torch.stack(outs, 2), memory

    def _linear(self, given: _Given, filled: Tensor | None, memory: Memory, at: int) -> tuple[Tensor, Memory]:
        """Blocks [B, H, N, C, .] of whole chunks, of a memory of one matrix."""
        blocks, size = given.q.shape[2:4]
        surprise = memory.surprise[0] if memory.surprise else None
        chunk = self.chunk or size
        out, before, last = linear_blocks(
            given.q, given.k, given.v, given.shares(), memory.weights[0], surprise, chunk
        )
        width = given.k.shape[-1]
        seen = memory.seen + (blocks * size if filled is None else filled)
        weights: Weights = (last[..., :width, :],)
        moved: Weights = (last[..., width:, :],) if memory.surprise else ()
        start = weights
        if filled is not None and chunk > 1:
            every = torch.cat([before, last[:, :, None]], 2)[..., :width, :]
            start = (every[torch.arange(len(seen), device=seen.device), :, (filled // size)],)
            start = _where(filled >= size, start, memory.start)
        for number in range(1, blocks + 1):
            end = last if number == blocks else before[:, :, number]
            self._note([end.detach()[..., :width, :].abs().amax()], at + number * size)
        return out, replace(memory, seen=seen, start=start, weights=weights, surprise=moved)

    def _note(self, peaks: list[Tensor], position: int) -> None:
        self.peaks.append(torch.stack(peaks))
        self.positions.append(position)


def _where(rows: Tensor, new: Weights, old: Weights) -> Weights:
    """`new` in the rows [B] that are True; without any choice between tensors where all are alike."""
    if bool(rows.all()):
        return new
    if not bool(rows.any()):
        return old
    return tuple(torch.where(rows[:, None, None, None], n, o) for n, o in zip(new, old, strict=True))


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor | None], chunk: int | None, activation: str,
    filled: Tensor | None,
) -> None:  # fmt: skip
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ShapeMismatch(
            f"q and k must be [B, H, T, n] and v [B, H, T, d]; they are {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}."
        )
    for name, gate in gates.items():
        if gate is not None and gate.shape != q.shape[:3]:
            raise ShapeMismatch(f"{name} must be {list(q.shape[:3])}, and is {list(gate.shape)}.")
    if filled is not None and filled.shape != (q.shape[0],):
        raise ShapeMismatch(f"filled must be [{q.shape[0]}], and is {list(filled.shape)}.")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise RegardError(f"chunk is {chunk!r}; it must be a whole number from 1, or None.")
    if activation not in ACTIVATIONS:
        raise RegardError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}.")
    for name, x in {"q": q, "k": k, "v": v, **gates}.items():
        if x is not None and not bool(torch.isfinite(x).all()):
            raise RegardError(f"{name} holds a number that is not finite.")


def _check_weights(weights: Weights, heads: int, keys: int, values: int) -> None:
    shapes = [tuple(w.shape) for w in weights]
    sizes = [keys, *(s[-1] for s in shapes)]
    fits = all(s == (heads, i, o) for s, i, o in zip(shapes, sizes, sizes[1:], strict=False))
    if not shapes or not fits or sizes[-1] != values:
        raise ShapeMismatch(
            f"weights must be one [{heads}, in, out] a layer, from {keys} to {values}, and are "
            f"{[list(s) for s in shapes]}."
        )


def _check_kept(memory: Memory, eta: Tensor | None) -> None:
    if (eta is None) == bool(memory.surprise):
        raise ShapeMismatch(
            "the memory was begun "
            + (
                "with momentum, and goes on without."
                if eta is None
                else "without momentum, and eta is given."
            )
        )
