"""Landmark attention that reads a few closed blocks of what it keeps of a text, for texts of any length.

A text is cut in sections of `local` tokens. A query attends in its own section as in `spec.py`, and besides
to `top_k` of the blocks of earlier sections, chosen by the score of their landmarks, for each token and head
by itself; of those `memory` are kept, the latest. Blocks that are read get new positions, within those that a
model was trained at: `read.py` has them.

Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 3.2. Status: positions and choice agree with the
official code; sections begin at multiples of `local` here, and where the caller cuts there. Keys are kept as
they stand inside their block, which is the same as before rotary embedding.
Operations O(T (m D + k L D + local D)), and of that a decoded position's; memory O(m L D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.attention.landmark.definition import memory_matrix
from regard.attention.landmark.fast import Regular, attend_regular
from regard.attention.landmark.looked import looked_at
from regard.attention.landmark.read import Far, Reader, merged
from regard.attention.landmark.rows import without_padding
from regard.attention.landmark.spec import scale_of
from regard.attention.landmark.store import Kept, Sizes, stacked
from regard.attention.landmark.turns import Turns
from regard.attention.mechanism import Context, LookedAt, Mechanism, State


class LandmarkMemoryHeads(Mechanism):
    """Landmark attention over a memory of blocks; the module of `LandmarkMemory`."""

    carries_state = True
    orders = frozenset({"causal"})

    def __init__(
        self, sizes: Sizes, top_k: int, choose: str, share: bool, turns: Turns | None, offload: str | None
    ) -> None:
        super().__init__()
        self.sizes, self.top_k, self.choose, self.share = sizes, top_k, choose, share
        self.turns: nn.Module | None = turns
        self.offload = offload

    def reader(self, scale: float) -> Reader:
        """Return how it chooses and reads blocks."""
        return Reader(self.top_k, self.choose, self.share, scale)

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        return memory_matrix(self, q, k, self.context(q, k, ctx))

    @torch.no_grad()
    def looked_at(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> LookedAt:
        ctx = self.context(q, k, ctx)
        scale, keys = scale_of(ctx, q), k.shape[2]
        q, k = _raised(q, k)
        chosen = without_padding(lambda q, k, _: self._chosen(q, k, scale), q, k, k, ctx)
        return looked_at(chosen, self.sizes, keys, ctx)

    def _chosen(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Which closed blocks the last rows of a text read, int64 [B, H, T, top_k]; -1 is none."""
        sizes, reader = self.sizes, self.reader(scale)
        length, local = k.shape[2], sizes.local
        early, closed = length - q.shape[2], length // local * local
        far = self._with_closed(self._empty(k, k), k[:, :, :closed], k[:, :, :closed], 0)
        found = q.new_full((*q.shape[:3], self.top_k), -1, dtype=torch.int64)
        for start in range(early // local * local, length, local):
            stop, first, last = min(start + local, length), max(start, early), start // sizes.block
            oldest = 0 if sizes.memory is None else max(0, last - sizes.memory)
            blocks, rows = far.part(oldest, last), slice(first - early, stop - early)
            count = reader.count(blocks)
            if count and first < stop:
                queries = self._at_distances(q[:, :, rows], first, first - start)
                found[:, :, rows, :count] = reader.chosen(queries, blocks) + oldest
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        scale = scale_of(ctx, q)

        def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            early = k.shape[2] - q.shape[2]
            kept = self._empty(k, v)
            if early:
                kept = self._run(None, k[:, :, :early], v[:, :, :early], kept, scale)[1]
            return self._run(q, k[:, :, early:], v[:, :, early:], kept, scale)[0]

        dtype = v.dtype
        q, k, v = _raised(q, k, v)
        return without_padding(work, q, k, v, ctx).to(dtype)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        ctx = self.context(q, k, ctx)
        dtype, scale = v.dtype, scale_of(ctx, q)
        q, k, v = _raised(q, k, v)
        out, kept = self._step(q, k, v, state, scale, ctx.valid_keys)
        return out.to(dtype), kept

    def absorb(self, k: Tensor, v: Tensor, heads: int, ctx: Context | None = None) -> State:
        k, v = _raised(k, v)
        return self._step(None, k, v, None, 1.0, None if ctx is None else ctx.valid_keys)[1]

    def _step(
        self, q: Tensor | None, k: Tensor, v: Tensor, state: State | None, scale: float, valid: Tensor | None
    ) -> tuple[Tensor, Kept]:
        kept = self._empty(k, v) if state is None else Kept(*state)
        if kept.even() and (valid is None or bool(valid.all())):
            return self._run(q, k, v, kept, scale)
        outs, after = [], []
        for row in range(k.shape[0]):
            places = torch.arange(k.shape[2]) if valid is None else valid[row].nonzero()[:, 0]
            places = places.to(k.device)
            k_, v_ = (x[row : row + 1, :, places] for x in (k, v))
            q_ = None if q is None else q[row : row + 1, :, places]
            found, one = self._run(q_, k_, v_, self.sizes.row(kept, row), scale)
            after.append(one)
            if q is not None:
                outs.append(v.new_zeros(1, *q.shape[1:3], v.shape[3]).index_copy(2, places, found))
        return torch.cat(outs) if outs else v, stacked(after)

    def _empty(self, k: Tensor, v: Tensor) -> Kept:
        return Kept.empty(k, v, self.sizes.block, self.offload)

    def _run(self, q: Tensor | None, k: Tensor, v: Tensor, kept: Kept, scale: float) -> tuple[Tensor, Kept]:
        """Read tokens that come after what is kept; all rows have the same number, and no padding."""
        sizes, local = self.sizes, self.sizes.local
        had, seen = kept.near_keys.shape[2], int(kept.seen[0]) if len(kept.seen) else 0
        keys, values = torch.cat([kept.near_keys, k], 2), torch.cat([kept.near_values, v], 2)
        length, begin = keys.shape[2], seen - had
        closed = length // local * local
        far, old = (
            self._with_closed(kept, keys[:, :, :closed], values[:, :, :closed], begin),
            kept.keys.shape[2],
        )
        outs = []
        for start in range(0, length, local) if q is not None else ():
            stop, first = min(start + local, length), max(start, had)
            if first >= stop or q is None:
                continue
            last = old + start // sizes.block
            blocks = far.part(0 if sizes.memory is None else max(0, last - sizes.memory), last)
            near = keys[:, :, start:stop], values[:, :, start:stop]
            rows = q[:, :, first - had : stop - had]
            outs.append(self._section(rows, *near, blocks, begin + first, scale))
        out = torch.cat(outs, 2) if outs else v.new_zeros(*(k if q is None else q).shape[:2], 0, v.shape[3])
        if sizes.memory is not None and far.keys.shape[2] > sizes.memory:
            far = Far(*(x[:, :, -sizes.memory :].clone() for x in far))
        rest = [x[:, :, closed:].clone() if closed else x for x in (keys, values)]
        return out, Kept(kept.seen + k.shape[2], *far, *rest)

    def _with_closed(self, kept: Kept, k: Tensor, v: Tensor, begin: int) -> Far:
        """The blocks that were kept, and those of the keys of whole sections, which begin at a position."""
        far, block = Far(*kept[1:4]), self.sizes.block
        if not k.shape[2]:
            return far
        if self.turns is not None:
            at = begin + torch.arange(k.shape[2], device=k.device)
            k = self.turns(k, at, at % block)
        k, v = (x.unflatten(2, (-1, block)) for x in (k, v))
        marks = k[:, :, :, :-1].mean(3) if self.choose == "mean" else k[:, :, :, -1]
        new = (marks, k.to(far.keys.device), v.to(far.values.device))
        return Far(*(torch.cat([old, one], 2) for old, one in zip(far, new, strict=True)))

    def _section(self, q: Tensor, k: Tensor, v: Tensor, far: Far, position: int, scale: float) -> Tensor:
        """Outputs of queries from `position` on, the last of those whose section's keys are given."""
        within = k.shape[2] - q.shape[2]
        out, lse = attend_regular(q, k, v, Regular(self.sizes.block, within, scale))
        reader = self.reader(scale)
        if not reader.count(far):
            return out
        queries = self._at_distances(q, position, within)
        chosen = reader.chosen(queries, far)
        return merged(out, lse, *reader.read(queries, chosen, far))

    def _at_distances(self, q: Tensor, position: int, within: int) -> Callable[[int], Tensor]:
        """The queries as they see a block some blocks before their section, by that distance."""
        if self.turns is None:
            return lambda distance: q
        turns, steps, found = self.turns, torch.arange(q.shape[2], device=q.device), {}

        def queries(distance: int) -> Tensor:
            if distance not in found:
                to = within + distance * self.sizes.block
                found[distance] = turns(q, position + steps, to + steps)
            return found[distance]

        return queries


def _raised(*given: Tensor) -> tuple[Tensor, ...]:
    """The same in float32, or float64 where they are."""
    return tuple(x if x.dtype == torch.float64 else x.float() for x in given)
