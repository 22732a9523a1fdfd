"""Titans' memory as context (MAC): segments that attend to persistent tokens and to what a memory recalls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block
from regard.attention.mechanism import State
from regard.attention.positions import Rotary
from regard.attention.titans.core import MemoryCore, Options
from regard.attention.titans.parts import (
    Aligned,
    Joined,
    attended,
    check_state,
    check_x,
    heads_of,
    merged,
)
from regard.engines.memory import Memory, Weights

CACHES = 4


class ContextMemory(Block):
    """Memory as context; the module of `Titans(variant="mac")`.

    Args:
        options: of the memory.
        segment: positions in a segment.
        persistent: number of learned tokens.
    """

    causal = True

    def __init__(self, options: Options, segment: int, persistent: int) -> None:
        super().__init__()
        dim, self.heads, self.segment = options.dim, options.heads, segment
        self.memory, self.joined = MemoryCore(options), Joined(dim)
        self.projections, self.turn = nn.Linear(dim, 3 * dim, bias=False), Rotary()
        self.recalled = nn.RMSNorm(dim, eps=1e-5)
        self.persistent = nn.Parameter(torch.randn(persistent, dim)) if persistent else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the outputs [B, T, dim]; valid is bool [B, T], False at padding."""
        return self.step(x, None, valid)[0]

    def step(
        self, x: Tensor, state: State | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        The state, batch first: keys and values of what was recalled and of x in the present segment, [B, H,
        segment, d], the memory's weights at its start by layer, and the memory's own state.
        """
        check_x(x, self.memory.options.dim)
        rows, outs, at = Aligned(x, valid), [x[:, :0]], 0
        state = self._fresh(x) if state is None else state
        self._check(state, x)
        phase = self._seen(state) % self.segment
        alike = x.shape[1] <= 1 or bool((phase == phase[0]).all())
        while at < x.shape[1]:
            count = min(self.segment - int(phase[0]), x.shape[1] - at) if alike else 1
            filled = None if rows.filled is None else (rows.filled - at).clamp(0, count)
            out, state = self._segment(rows.x[:, at : at + count], state, phase, filled)
            outs.append(out)
            at, phase = (
                at + count,
                (phase + count) % self.segment if alike else self._seen(state) % self.segment,
            )
        return rows.back(torch.cat(outs, 1)), state

    def _segment(self, x: Tensor, state: State, phase: Tensor, filled: Tensor | None) -> tuple[Tensor, State]:
        """Positions of one segment; the first of them is number `phase` [B] in it."""
        caches, read, own = self._parted(state)
        places = phase[:, None] + torch.arange(x.shape[1], device=x.device)
        q, kept = self._kept(x, self.recalled(self.memory.recall(x, read)), places, caches)
        y = self._attend(q, kept, places)
        answers, after = self.memory.mix(y, own, filled)
        active = None if filled is None else filled > 0
        if active is not None:
            kept = tuple(_chosen(active, n, o) for n, o in zip(kept, caches, strict=True))
        whole = (after[1] % self.segment == 0) & (after[1] > own[1])
        now = Memory.of(after[1:], self.memory.options.depth).weights
        read = tuple(_chosen(whole, n, o) for n, o in zip(now, read, strict=True))
        return self.joined(y, answers), (*kept, *read, *after)

    def _kept(self, x: Tensor, h: Tensor, places: Tensor, caches: State) -> tuple[Tensor, State]:
        """The queries of x, and the caches with keys and values of h and x written at `places` [B, T]."""
        count, later = x.shape[1], places + self.segment
        q, k, v = (heads_of(part, self.heads) for part in self.projections(torch.cat([h, x], 1)).chunk(3, -1))
        k = self.turn(k, torch.cat([places, later], 1))
        new: State = (k[:, :, :count], v[:, :, :count], k[:, :, count:], v[:, :, count:])
        if count < self.segment:
            index = places[:, None, :, None].expand_as(new[0])
            new = tuple(c.scatter(2, index, n) for c, n in zip(caches, new, strict=True))
        return self.turn(q[:, :, count:], later), new

    def _attend(self, q: Tensor, kept: State, places: Tensor) -> Tensor:
        """Attention over [P, h, x], where a position sees both only up to itself, [B, T, dim]."""
        keys, values = torch.cat([kept[0], kept[2]], 2), torch.cat([kept[1], kept[3]], 2)
        upto = torch.arange(self.segment, device=q.device) <= places[..., None]
        visible = torch.cat([upto, upto], -1)[:, None]
        if self.persistent is not None:
            _, k, v = self.projections(self.persistent[None].to(q.dtype)).chunk(3, -1)
            first = (heads_of(part, self.heads).expand(len(q), -1, -1, -1) for part in (k, v))
            keys, values = (torch.cat([p, rows], 2) for p, rows in zip(first, (keys, values), strict=True))
            visible = F.pad(visible, (len(self.persistent), 0), value=True)
        return merged(attended(q, keys, values, visible))

    def _fresh(self, x: Tensor) -> State:
        own = self.memory.mix(x[:, :0], None)[1]
        width = x.shape[-1] // self.heads
        cache = x.new_zeros(x.shape[0], self.heads, self.segment, width)
        return (*[cache] * CACHES, *Memory.of(own[1:], self.memory.options.depth).weights, *own)

    def _parted(self, state: State) -> tuple[State, Weights, State]:
        """Caches, weights to read by, the memory's own state."""
        stop = CACHES + self.memory.options.depth
        return state[:CACHES], state[CACHES:stop], state[stop:]

    def _seen(self, state: State) -> Tensor:
        return self._parted(state)[2][1]

    def _check(self, state: State, x: Tensor) -> None:
        batch, width = x.shape[0], x.shape[-1] // self.heads
        caches = [[batch, self.heads, self.segment, width]] * CACHES
        weights = [[batch, *w.shape] for w in self.memory.weights]
        check_state(state, [*caches, *weights, *self.memory.shapes(batch)])
        check_state(state[:CACHES], caches, x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """The definition, position by position; the convolution is taken over all of them each time."""
        memory, ys, answers = self.memory.naive(x.shape[0]), [], []
        cache: list[Tensor] = [
            x.new_zeros(x.shape[0], self.heads, self.segment, x.shape[-1] // self.heads)
        ] * 4
        read = memory.weights
        for i in range(x.shape[1]):
            read = memory.weights if i % self.segment == 0 else read
            here, place = x[:, i : i + 1], torch.full((len(x), 1), i % self.segment, device=x.device)
            q, kept = self._kept(here, self.recalled(self.memory.recall(here, read)), place, tuple(cache))
            cache = list(kept)
            ys.append(self._attend(q, kept, place))
            past = torch.cat(ys, 1)
            parts, gates, _ = self.memory.parts(past, self.memory.fresh_tail(past))
            now = [None if g is None else g[..., -1] for g in gates]
            last_q, last_k, last_v = (p[:, :, -1] for p in parts)
            out = memory.write(last_q, last_k, last_v, (now[0], now[1], now[2]))  # type: ignore[arg-type]
            answers.append(out.flatten(1)[:, None].to(x.dtype))
        if not ys:
            return self.joined(x, x)
        return self.joined(torch.cat(ys, 1), torch.cat(answers, 1))

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, 13, self.memory.options.dim, generator=generator, dtype=torch.float64)


def _chosen(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the sequences [B] that are True, `old` in the others."""
    return torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new, old)
