"""The chunked recurrence and its gradient, a piece at a time, in plain torch.

A piece is some chunks that a cache holds. Over its chunks, with Q, K and P as in `near.py`,

    out = P v + Q S,    S <- kept (S + K^T v)

and backward, with R the gradient of the state after a chunk and R' = kept R,

    dP = dout v^T,  dQ = dout S^T,  dK = v R'^T,  dv = P^T dout + K R',  R <- Q^T dout + R'

where S of every chunk is computed again from that at the start of its piece. Where the keys have been aged to
the end of their chunk already, `kept` applies to the old state alone. Qin et al., 2024, arXiv 2401.04658,
algorithms 1 and 2; the split into pieces is our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from regard.engines import near
from regard.engines.fresh import fresh
from regard.engines.near import Factored, Halved, Near, Weighted, factors_of

NUMBERS = {"cpu": 2**18, "cuda": 2**26}


class Span(NamedTuple):
    """Batch rows and positions of a piece, which is `number` chunks of `size`."""

    rows: slice
    start: int
    number: int
    size: int

    def chunks(self, x: Tensor) -> Tensor:
        """The part of `x` [B, ..., T, D] in chunks, [N, B, ..., C, D]; a view."""
        x = x[self.rows] if x.shape[0] > 1 else x
        x = x.narrow(-2, self.start, self.number * self.size)
        return x.unflatten(-2, (self.number, self.size)).movedim(-3, 0)


@dataclass
class Scratch:
    """Tensors that are used again from piece to piece."""

    kept: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor for the use `name`; what it holds is unspecified."""
        key = (name, shape, dtype)
        if key not in self.kept:
            self.kept[key] = torch.empty(shape, dtype=dtype, device=like.device)
        return self.kept[key]


class Pieces:
    """The recurrence over q [B, H, G, T, D], k [B, H, T, D] and v [B, H, T, Dv], T > 0.

    Args:
        decay: g, [H] where it is the same at all positions, else [B|1, H|1, T, D|1], or None.
        chunk: positions in a chunk.
        kind: the type of the products; states are float32 or float64.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, chunk: int, kind: torch.dtype
    ) -> None:
        self.q, self.k, self.v, self.decay, self.chunk, self.kind = q, k, v, decay, chunk, kind
        self.wide = torch.float64 if kind == torch.float64 else torch.float32
        self.scratch = Scratch()
        self._steady: dict[int, tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}

    def spans(self) -> Iterator[list[Span]]:
        """The pieces of each part of the batch, in the order of positions."""
        batch, heads, group, length, width = self.q.shape
        by_channel = self.decay is not None and self.decay.ndim == 4 and self.decay.shape[3] > 1
        each = heads * group * max(width, self.v.shape[3]) * self.chunk
        count = max(1, NUMBERS.get(self.q.device.type, NUMBERS["cuda"]) // each)
        rows = max(1, NUMBERS.get(self.q.device.type, NUMBERS["cuda"]) // (each * min(count, 4)))
        lengths = [(n, self.chunk) for n in _even(length // self.chunk, count)]
        rest = length % self.chunk
        if by_channel:  # halves need powers of two
            lengths += [(1, 1 << i) for i in reversed(range(rest.bit_length())) if rest >> i & 1]
        elif rest:
            lengths.append((1, rest))
        for first in range(0, batch, rows):
            start, found = 0, []
            for number, size in lengths:
                found.append(Span(slice(first, min(batch, first + rows)), start, number, size))
                start += number * size
            yield found

    def forward(self, state: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out [B, H, G, T, Dv], the last state, and if `keep` those before pieces [n, B, H, D, Dv]."""
        out = fresh((*self.q.shape[:-1], self.v.shape[-1]), self.wide, self.q.device)
        last, before = torch.empty_like(state), []
        for spans in self.spans():
            now = state[spans[0].rows]
            kept = []
            for span in spans:
                kept.append(now)
                now = self._forward(span, now, out)
            last[spans[0].rows] = now
            before.append(torch.stack(kept) if keep else now)
        return out, last, torch.cat(before, 1) if keep else None

    def _forward(self, span: Span, state: Tensor, out: Tensor) -> Tensor:
        scores, v, part = self.near(span), self._copy("v", self.v, span), span.chunks(out)
        states, last = self._states(scores, v, state, span)
        made = self.scratch.take("out", (v.shape[0], scores.q.shape[1], v.shape[2]), v, self.kind)
        torch.bmm(scores.scores, v, out=made)
        made.baddbmm_(scores.q, states)
        part.copy_(made.view(part.shape))
        return last

    def _copy(self, name: str, x: Tensor, span: Span) -> Tensor:
        """The chunks of `x` as contiguous matrices, [X, ..., C, D]."""
        part = span.chunks(x)
        return self.scratch.take(name, part.shape, x, self.kind).copy_(part).flatten(0, 2)

    def near(self, span: Span, keep: bool = False) -> Near:
        """The scores of the chunks of a piece; `keep` where gradients will be asked for."""
        q, k = span.chunks(self.q), span.chunks(self.k)
        scores = (k.shape[:3].numel(), q.shape[3] * span.size, span.size)
        room = (
            self.scratch.take("q", q.shape, q, self.kind),
            self.scratch.take("k", k.shape, k, self.kind),
            self.scratch.take("scores", scores, q, self.kind),
        )
        if self.decay is None:
            return Factored(q, k, None, room)
        if self.decay.ndim == 1:
            sums, factors = self._steady_sums(span.size)
            return Weighted(q, k, sums, room) if factors is None else Factored(q, k, factors, room)
        exponents = span.chunks(self.decay)
        by_channel = exponents.shape[-1] > 1
        sums = exponents.cumsum(-2, dtype=self.wide if by_channel else torch.float64)
        if bool(sums[..., -1, :].min() >= -near.REACH):
            return Factored(q, k, factors_of(sums, self.wide), room)
        return Halved(q, k, exponents, room, keep) if by_channel else Weighted(q, k, sums, room)

    def _steady_sums(self, size: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """b of a chunk [1, 1, H, C, 1] where it is the same for all, and its factors where it has some."""
        if size not in self._steady:
            assert self.decay is not None
            steps = torch.arange(1, size + 1, dtype=torch.float64, device=self.decay.device)
            sums = (self.decay.double()[:, None] * steps)[None, None, :, :, None]
            safe = bool(sums.min() >= -near.REACH)
            self._steady[size] = sums, factors_of(sums, self.wide) if safe else None
        return self._steady[size]

    def _states(self, scores: Near, v: Tensor, state: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """The states before each chunk, [X, D, Dv] in the type of products, and that after the last."""
        shape = (span.number, *state.shape)
        states = self.scratch.take("states", (span.number + 1, *state.shape), state, self.wide)
        written = self.scratch.take("written", (v.shape[0], *state.shape[2:]), v, self.kind)
        torch.bmm(scores.k.transpose(1, 2), v, out=written)
        by_chunk, kept = written.to(self.wide).view(shape), scores.kept
        if kept is not None and scores.late:
            by_chunk.mul_(kept)
        states[0] = state
        for i in range(span.number):
            _step(by_chunk[i], states[i], kept, i, states[i + 1])
        return states[:-1].to(self.kind).flatten(0, 2), states[-1].clone()

    def backward(
        self, grad_out: Tensor, before: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v and the state before, given those of out and the state after.

        Args:
            grad_out: [B, H, G, T, Dv].
            before: the states before pieces, as `forward` returned them.
            grad_state: [B, H, D, Dv].
        """
        into = [fresh(x.shape, x.dtype, x.device) for x in (self.q, self.k, self.v)]
        first = torch.empty_like(grad_state)
        for spans in self.spans():
            now, states = grad_state[spans[0].rows], before[:, spans[0].rows]
            for span, state in zip(reversed(spans), reversed(states), strict=True):
                now = self._backward(span, state, now, grad_out, into)
            first[spans[0].rows] = now
        return into[0], into[1], into[2], first

    def _backward(
        self, span: Span, state: Tensor, after: Tensor, grad_out: Tensor, into: list[Tensor]
    ) -> Tensor:
        scores, v = self.near(span, keep=True), self._copy("v", self.v, span)
        states, _ = self._states(scores, v, state, span)
        to_q, to_k, to_v = (span.chunks(x) for x in into)
        given = self._copy("given", grad_out, span).flatten(1, 2)
        later, first = self._later(scores, given, after, span)
        room = self.scratch.take
        of_scores = torch.bmm(
            given, v.transpose(1, 2), out=room("dscores", scores.scores.shape, v, self.kind)
        )
        of_q = torch.bmm(given, states.transpose(1, 2), out=room("dq", scores.q.shape, v, self.kind))
        of_k = torch.bmm(v, later.transpose(1, 2), out=room("dk", scores.k.shape, v, self.kind))
        of_v = torch.bmm(scores.scores.transpose(1, 2), given, out=room("dv", v.shape, v, self.kind))
        to_v.copy_(of_v.baddbmm_(scores.k, later).view(to_v.shape))
        scores.gradients(of_scores, of_q, of_k, to_q, to_k)
        return first

    def _later(self, scores: Near, given: Tensor, after: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """R' of each chunk, or R where keys have aged, [X, D, Dv]; and R before the first."""
        shape, kept = (span.number, *after.shape), scores.kept
        later = self.scratch.take("later", shape, after, self.wide)
        read = self.scratch.take("read", (given.shape[0], *after.shape[2:]), given, self.kind)
        by_chunk = torch.bmm(scores.q.transpose(1, 2), given, out=read).to(self.wide).view(shape)
        for i in reversed(range(span.number)):
            later[i] = after
            after = _step(by_chunk[i], later[i], kept, i, torch.empty_like(after))
        if kept is not None and scores.late:
            later.mul_(kept)
        return later.to(self.kind).flatten(0, 2), after


def _step(added: Tensor, state: Tensor, kept: Tensor | None, chunk: int, out: Tensor) -> Tensor:
    """added + kept * state, into `out`."""
    if kept is None:
        return torch.add(added, state, out=out)
    return torch.addcmul(added, state, kept[chunk if kept.shape[0] > 1 else 0], out=out)


def _even(count: int, most: int) -> list[int]:
    """`count` in as few parts of at most `most` as there can be, as even as can be."""
    parts = -(-count // most)
    return [count // parts + (i < count % parts) for i in range(parts)]
