"""The search of HiP: which key blocks each block of queries reads, in log2 rounds.

The span is the keys between the first tokens and the window, cut into blocks of `key_block`. It is tiled
with K stretches; each round halves them, scores every half by one block of it, its representative, and
keeps the K best halves, until a stretch is one block:

    score(half) = max q_i . k_j   over sampled queries i, tokens j < pos_i - w of the representative

`v1` starts from a grid of K cells over the whole span; each round doubles the resolution and keeps the K best
of the finer cells, scored by the block in which they begin.

All heads and query blocks go through a round together, in pieces whose keys stay in a cache. Scores are
float32 (float64 of float64 inputs), and where they are equal the earlier block is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.attention.layout import Layout, lies_in_rows, rows_of
from regard.attention.select import top_k

if TYPE_CHECKING:
    from regard.attention.hip.spec import HiP

PIECE = {"cpu": 2**21, "cuda": 2**27}


def search(q: Tensor, k: Tensor, layout: Layout, spec: HiP) -> Tensor:
    """Return the key blocks that each query block reads besides window and first tokens.

    Args:
        q: compact queries [B, H, T, D].
        k: keys [B, Hkv, S, D], as the call has them.

    Returns:
        int64 [B, H, Q, n], numbers of blocks of compact keys, ascending, then -1; n <= ceil(k / key_block).
    """
    with torch.no_grad():
        return _Search(q.detach(), k.detach(), layout, spec).run()


def everything(chosen: Tensor, spans: Tensor, spec: HiP) -> Tensor:
    """Put all of it where a span has no more blocks than are kept.

    Args:
        chosen: int64 [B|1, H|1, Q, n].
        spans: int64 [B|1, Q], blocks in each span.
    """
    spans = spans[:, None, :, None]
    every = torch.arange(chosen.shape[3], device=chosen.device)
    whole = torch.where(every < spans, every + spec.sink // spec.key_block, -1)
    return torch.where(spans <= -(-spec.k // spec.key_block), whole, chosen)


def spans_of(layout: Layout, spec: HiP) -> Tensor:
    """Return the number of key blocks that each query block searches, int64 [B|1, Q]."""
    span = (layout.ends(spec.query_block) - spec.window - spec.sink).clamp(min=0)
    return -(span // -spec.key_block)


@dataclass(eq=False)
class _Piece:
    """Query blocks of a search: queries [B, H, Q', R, D], their places [B|1, Q', R], spans [B|1, Q']."""

    queries: Tensor
    places: Tensor
    spans: Tensor
    most: int


class _Search:
    def __init__(self, q: Tensor, k: Tensor, layout: Layout, spec: HiP) -> None:
        self.spec, self.layout, self.k = spec, layout, k
        self.q = q
        self.batch, self.heads = q.shape[:2]
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.keep = -(-spec.k // spec.key_block)
        self.first = spec.sink // spec.key_block
        self.spans = spans_of(layout, spec)
        self.inside = torch.arange(0, spec.key_block, spec.key_stride, device=k.device)
        self.size = min(spec.query_block, max(1, q.shape[2]))
        # of the tokens in the span, the last `size` at most are hidden from some query of a block
        self.late = 2 * ((self.size - 1) // spec.key_block + 2)
        self.per = self._per_row()
        self.flat, first = rows_of(k, self.per)
        self.base = first.repeat_interleave(self.heads // k.shape[1], 1)[:, :, None, None]
        self._room = k.new_empty(0)
        self._table = self._all_scores() if self._reads_less_in_all() else None

    def run(self) -> Tensor:
        spec, most = self.spec, self.spans.amax(0).tolist()
        width = min(self.keep, max(most, default=0))
        each = 2 * self.keep * len(self.inside) * self.k.shape[3] * self.batch * self.heads
        step = max(1, PIECE.get(self.k.device.type, PIECE["cuda"]) // max(1, each))
        found, start = [], 0
        while start < len(most):
            searched = most[start] > self.keep
            stop = start + 1
            while stop < len(most) and (most[stop] > self.keep) == searched and (
                stop < start + step or not searched
            ):  # fmt: skip
                stop += 1
            chosen = (
                self._all(stop - start) if not searched else self._searched(self._piece(start, stop, most))
            )
            chosen = chosen[..., :width]
            if not searched or self.layout.key_at is not None:
                chosen = everything(chosen, self.spans[:, start:stop], spec)
            found.append(chosen)
            start = stop
        if not found:
            return self.spans.new_zeros(self.batch, self.heads, 0, 0)
        return torch.cat([x.expand(self.batch, self.heads, -1, -1) for x in found], 2)

    def _all(self, blocks: int) -> Tensor:
        every = torch.arange(self.keep, device=self.k.device) + self.first
        return every.expand(1, 1, blocks, -1)

    def _piece(self, start: int, stop: int, most: list[int]) -> _Piece:
        rows = self._sampled(start, stop)  # [B|1, Q', R]
        if len(rows) == 1:
            queries = self.q.index_select(2, rows.flatten()).unflatten(2, rows.shape[1:])
        else:
            index = rows.flatten(1)[:, None, :, None].expand(-1, self.heads, -1, self.q.shape[3])
            queries = self.q.gather(2, index).unflatten(2, rows.shape[1:])
        layout = self.layout
        places = rows + layout.offset[:, None, None] + 1 if layout.causal else layout.seen[:, None, None]
        return _Piece(queries.to(self.wide), places, self.spans[:, start:stop], max(most[start:stop]))

    def _sampled(self, start: int, stop: int) -> Tensor:
        """Every `query_stride`-th row of each block, int64 [B|1, Q', R]; in a short one rows repeat."""
        size, stride = self.size, min(self.spec.query_stride, self.size)
        first = (torch.arange(start, stop, device=self.k.device) * size)[None, :, None]
        last = torch.minimum(self.layout.rows[:, None, None], first + size) - 1
        rows = first + torch.arange(stride - 1, size, stride, device=self.k.device)
        return torch.where(rows <= last, rows, torch.minimum(first + stride - 1, last)).clamp(min=0)

    def _searched(self, piece: _Piece) -> Tensor:
        if self.spec.variant == "v1":
            return self._doubled(piece)
        edges = torch.arange(self.keep + 1, device=self.k.device) * piece.spans[..., None] // self.keep
        # stretches [B|1, H|1, Q', n, 2]: where each begins, and its size
        stretches = torch.stack([edges[:, None, :, :-1] + self.first, edges.diff()[:, None]], -1)
        for _ in range(_rounds(-(-piece.most // self.keep))):
            starts, sizes = stretches.unbind(-1)
            half = sizes >> 1
            halves = torch.stack([starts, half, starts + half, sizes - half], -1)
            halves = halves.view(*starts.shape[:3], -1, 2)
            starts, sizes = halves.unbind(-1)
            speaks = starts + (sizes >> 1) if self.spec.representative == "center" else starts
            kept = self._best(self._scores(piece, speaks), sizes == 0)
            kept = kept[..., None].expand(*kept.shape, 2)
            stretches = halves.expand(self.batch, self.heads, -1, -1, -1).gather(3, kept)
        return stretches[..., 0]

    def _doubled(self, piece: _Piece) -> Tensor:
        """Cells of a grid of `keep` * 2, * 4, ... over the span, at last of one block each."""
        spans = piece.spans[:, None, :, None].clamp(min=1)  # [B|1, 1, Q', 1]
        grid = spans.clamp(max=self.keep)
        cells = torch.arange(self.keep, device=self.k.device).expand(1, 1, len(piece.spans[0]), -1)
        for _ in range(_rounds(-(-piece.most // self.keep))):
            finer = torch.minimum(2 * grid, spans)
            begin, end = (x * finer // grid for x in (cells, cells + 1))
            cells = torch.stack([begin, begin + 1], -1).flatten(3)
            twice = (torch.stack([begin, begin + 1], -1) < end[..., None]).flatten(3)
            scores = self._scores(piece, (cells * spans // finer).clamp(max=spans - 1) + self.first)
            kept = self._best(scores, ~twice)
            cells = cells.expand(self.batch, self.heads, -1, -1).gather(3, kept)
            grid = finer
        return cells + self.first

    def _per_row(self) -> int:
        """How many keys are fetched as one: a block where blocks lie side by side, or are worth laying so."""
        spec, k = self.spec, self.k
        blocks = self.layout.key_at is None and spec.window and spec.key_stride == 1
        lie = lies_in_rows(k, spec.key_block) or self.q.shape[2] > 1
        return spec.key_block if blocks and lie else 1

    def _reads_less_in_all(self) -> bool:
        """Whether one row, in decoding, would read less of the keys if it were scored with all of them."""
        plain = self.layout.key_at is None and self.spec.window and self.k.dtype == self.wide
        if self.q.shape[2] != 1 or not plain:
            return False
        rounds = _rounds(-(-int(self.spans.max()) // self.keep)) if self.spans.numel() else 0
        of_tree = self.heads * rounds * 2 * self.keep * len(self.inside)
        return rounds > 0 and self.k.shape[1] * self.k.shape[2] <= of_tree

    def _all_scores(self) -> Tensor:
        """The scores of all blocks for one row, [B, H, 1, blocks]."""
        spec, end = self.spec, self.layout.keys - self.spec.window
        by_group = self.q.unflatten(1, (self.k.shape[1], -1)).squeeze(3)
        scores = (by_group @ self.k[:, :, : self.layout.keys].transpose(2, 3)).flatten(1, 2)
        scores[..., end:] = torch.finfo(self.wide).min
        scores = scores[..., : end + spec.key_block - 1 - (end - 1) % spec.key_block]
        by_place = scores.unflatten(2, (-1, spec.key_block)).unbind(-1)[:: spec.key_stride]
        return reduce(torch.maximum, by_place)[:, :, None]

    def _scores(self, piece: _Piece, blocks: Tensor) -> Tensor:
        """Return the score of each block [B|1, H|1, Q', n], [B, H, Q', n]."""
        some = self.batch, self.heads, len(piece.spans[0])
        if self._table is not None:
            return self._table.gather(3, blocks.expand(*some, -1))
        at = blocks if self.per > 1 else self._tokens(blocks)
        shape = *some, blocks.shape[3] * len(self.inside)
        if self.layout.key_at is not None:
            known = self.layout.key_at[:, None, None].expand(*some, -1)
            at = known.gather(3, at.expand(shape).clamp(max=known.shape[3] - 1))
        at = at.clamp(max=self.k.shape[2] - 1) if self.spec.window == 0 else at
        keys = self._fetched((at + self.base).flatten()).view(-1, shape[3], self.k.shape[3])
        queries = piece.queries.flatten(0, 2)  # [B H Q', R, D]
        scores = torch.bmm(keys, queries.transpose(1, 2)).view(*shape, -1)
        late = self._tokens(blocks[..., -self.late :])
        hidden = late[..., None] >= piece.places[:, None, :, None] - self.spec.window
        scores[..., -late.shape[3] :, :].masked_fill_(hidden, torch.finfo(self.wide).min)
        return scores.view(*some, blocks.shape[3], -1).amax(-1)

    def _tokens(self, blocks: Tensor) -> Tensor:
        """The keys of blocks [..., n] that take part in the search, [..., n * keys of a block]."""
        return (blocks[..., None] * self.spec.key_block + self.inside).flatten(-2)

    def _fetched(self, at: Tensor) -> Tensor:
        """The keys at rows of `flat`, in room that every round uses again."""
        size = at.numel() * self.flat.shape[1]
        if self._room.numel() < size:
            self._room = self.k.new_empty(size)
        into = self._room[:size].view(-1, self.flat.shape[1])
        return torch.index_select(self.flat, 0, at, out=into).to(self.wide)

    def _best(self, scores: Tensor, absent: Tensor) -> Tensor:
        """Return the places of the `keep` best of scores [B, H, Q', n], which are written to, ascending.

        A sequence of a padded batch that is too short to have so many is given all of its span afterwards.
        """
        best = top_k(scores.masked_fill_(absent, -torch.inf), self.keep)
        return best if self.layout.key_at is None else best.clamp(min=0)


def _rounds(size: int) -> int:
    """How often a stretch of this size is halved until it is one block."""
    return max(0, math.ceil(math.log2(max(1, size))))
