"""The lens that feeds the report's patterns: every head of one sequence, in one forward.

Kept per head: the pattern pooled into at most 64 x 64 bins, as in `regard.lens.patterns`; beside it all
weights as float16 where those of all heads fit into `most_bytes`, and else the `strongest` keys of each row.
Memory is at most `most_bytes`, and else grows with the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NothingObserved
from regard.lens.grid import Grid
from regard.lens.matches import tokens_of
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.protocol import EVERYTHING, Lens, Wanted

BINS = 64
STRONGEST = 8


@dataclass(eq=False)
class Recorded:
    """What was kept of one site.

    Attributes:
        site: its alias.
        queries, keys: token ids of the rows and keys, or None where the site sees no tokens.
        length: rows and keys, padding left out.
        grid: the pooled patterns of all heads.
        exact: float16 [H, T, S], or None where that was too much.
        top_keys, top_weights: int32 and float16 [H, T, k], the strongest first; None where `exact` is kept.
    """

    site: str
    queries: list[int] | None
    keys: list[int] | None
    length: tuple[int, int]
    grid: Grid
    exact: Tensor | None = None
    top_keys: Tensor | None = None
    top_weights: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.grid.total.shape[1]

    @cached_property
    def strongest(self) -> tuple[Tensor, Tensor]:
        """The strongest keys of every row and their weights, [H, T, k] on the CPU, the strongest first."""
        if self.exact is None:
            assert self.top_keys is not None and self.top_weights is not None
            return self.top_keys.cpu(), self.top_weights.float().cpu()
        weights = self.exact.float()
        keys = weights.abs().topk(min(STRONGEST, weights.shape[2]), -1).indices
        return keys.int().cpu(), weights.gather(2, keys).cpu()


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(Lens):
    """Keep what the report shows of every head; the result is a list of `Recorded`, one a site.

    It follows the first forward that begins at the first token; steps that continue a cache are passed over.

    Attributes:
        sequence: which sequence of the batch.
        strongest: how many keys a row, where not all weights fit.
        most_bytes: so much memory for all weights of all heads.
    """

    sequence: int = 0
    strongest: int = STRONGEST
    most_bytes: int = 384 * 2**20
    sites: dict[str, Recorded] = field(default_factory=dict, init=False, repr=False)
    of: Any = field(default=None, init=False, repr=False)

    def fresh(self) -> Lens:
        twin = super().fresh()
        object.__setattr__(twin, "sites", {})
        return twin

    def check(self, anatomy: Anatomy) -> None:
        object.__setattr__(self, "of", len(anatomy.sites))

    def wants(self, call: Call) -> Wanted | None:
        if call.index or (call.q_offset and not call.site.cross) or call.q.shape[0] <= self.sequence:
            return None
        state = call.run.state(self, call.site)
        if call.site.alias in self.sites and "open" not in state:
            return None
        state["open"] = True
        return EVERYTHING

    def weights(self, block: RowBlock) -> None:
        call: Call = block.call
        state = block.run.state(self, block.site)
        if "kept" not in state:
            state["kept"] = self.sites[block.site.alias] = self._begin(call, block.weights)
        kept: Recorded = state["kept"]
        first_row, first_key = self._first(call.valid_queries), self._first(call.valid_keys)
        row, key = max(0, block.start - first_row), max(0, block.key_start - first_key)
        rows = slice(max(0, first_row - block.start), max(0, first_row + kept.length[0] - block.start))
        keys = slice(
            max(0, first_key - block.key_start), max(0, first_key + kept.length[1] - block.key_start)
        )
        part = block.weights[self.sequence, :, rows, keys].float()
        if not part.numel():
            return
        kept.grid.add(0, part, row, key)
        place = slice(row, row + part.shape[1])
        if kept.exact is not None:
            kept.exact[:, place, key : key + part.shape[2]] = part
            return
        assert kept.top_keys is not None and kept.top_weights is not None
        count = min(kept.top_keys.shape[2], part.shape[2])
        signed = bool((part < 0).any())
        best = (part.abs() if signed else part).topk(count, -1).indices
        kept.top_keys[:, place, :count] = (best + key).int()
        kept.top_weights[:, place, :count] = part.gather(-1, best).half()

    def result(self) -> list[Recorded]:
        """Return what was kept, in the order of the sites.

        Raises:
            NothingObserved: where no attention was opened.
        """
        if not self.sites:
            raise NothingObserved("no attention was opened, so there are no patterns to show.")
        return list(self.sites.values())

    def _begin(self, call: Call, weights: Tensor) -> Recorded:
        heads, device = weights.shape[1], weights.device
        length = (
            self._count(call.valid_queries, call.query_length),
            self._count(call.valid_keys, call.key_length),
        )
        ids = tokens_of(call)
        queries = keys = self._ids(ids, call.valid_queries, length[0])
        if call.site.cross:
            fed = call.run.token_ids
            queries = self._ids(fed, call.valid_queries, length[0])
            keys = self._ids(call.run.encoder_ids, call.valid_keys, length[1])
        kept = Recorded(call.site.alias, queries, keys, length, Grid(1, heads, BINS, device))
        if 2 * heads * length[0] * length[1] * (self.of or 1) <= self.most_bytes:
            kept.exact = torch.zeros(heads, *length, dtype=torch.float16, device=device)
        else:
            shape = (heads, length[0], min(self.strongest, length[1]))
            kept.top_keys = torch.zeros(*shape, dtype=torch.int32, device=device)
            kept.top_weights = torch.zeros(*shape, dtype=torch.float16, device=device)
        return kept

    def _first(self, valid: Tensor | None) -> int:
        return 0 if valid is None else int(valid[min(self.sequence, len(valid) - 1)].int().argmax())

    def _count(self, valid: Tensor | None, length: int) -> int:
        return length if valid is None else int(valid[min(self.sequence, len(valid) - 1)].sum())

    def _ids(self, ids: Tensor | None, valid: Tensor | None, length: int) -> list[int] | None:
        if ids is None or ids.shape[0] <= self.sequence:
            return None
        first = self._first(valid)
        found: list[int] = ids[self.sequence, first : first + length].tolist()
        return found if len(found) == length else None
