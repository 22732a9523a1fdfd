"""How much a head attends to the token just before.

    s = mean over rows i >= 1 of A_{i, i-1}

"A Mathematical Framework for Transformer Circuits" (Elhage et al., 2021) and "In-context Learning and
Induction Heads" (Olsson et al., 2022, arXiv 2209.11895) call heads of high s previous-token heads.
A sink logit's share counts as mass that went elsewhere. Status: agrees with the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.engines.stats import diagonal
from regard.errors import RegardError
from regard.lens.base import RowMeans
from regard.lens.registry import lens
from regard.lens.sentences import strongest
from regard.lens.visible import Visible, mask_key, once, per_forward, visible, visible_part
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted


@lens("previous-token")
@dataclass(frozen=True, kw_only=True, eq=False)
class PreviousToken(RowMeans):
    """Measure the mean attention to the token a fixed distance back.

    Columns: `score`, and `chance`, what it would be were each row spread evenly over what it can see.

    Attributes:
        offset: how far back; rows that see no token that far back are not counted, as at the start of a
            text, beyond a sliding window, or where texts are packed one after the other.
    """

    columns = ("score", "chance")
    definition = "mean attention to the previous token; chance: even over the visible keys"
    source = "Olsson et al. 2022, arXiv 2209.11895"
    needs = "it takes self-attention over more than one token"
    offset: int = 1

    def __post_init__(self) -> None:
        if self.offset < 1:
            raise RegardError(f"PreviousToken looks back: offset is {self.offset}, and must be at least 1.")

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def measure(self, block: RowBlock) -> tuple[Tensor, Visible]:
        call = block.call
        shift = call.q_offset + block.start - self.offset - call.kv_offset - block.key_start
        _note_seen(block, self.offset, shift)
        band, first = diagonal(block.weights, shift)
        if block.valid_rows is not None:
            band = band * block.valid_rows[:, None, first : first + band.shape[-1]]
        return band.sum((0, 2)), visible(block)

    def total(self, call: Call, parts: list[tuple[Tensor, Visible]]) -> tuple[Tensor, Tensor]:
        score = torch.stack([part for part, _ in parts]).sum(0)
        even, count = once(call, ("even", self.offset), lambda: _even(call, self.offset, parts[-1][1].keys))
        return torch.stack([score, even.expand_as(score)]), count.expand(2)[:, None]

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        return strongest(result, "the token just before", "previous-token")


def _even(call: Call, offset: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of rows that are even over the keys they see, [B|1, T], and how many rows count."""
    keep = call.query_positions >= offset
    if (back := _seen(call, offset)) is not None:
        keep = keep & back
    keep = keep if call.valid_queries is None else keep & call.valid_queries
    keep = keep.expand(call.q.shape[0], -1)
    return (keep / seen.clamp_min(1)).sum(), keep.sum()


def _seen(call: Call, offset: int) -> Tensor | None:
    """Return which rows of a call see the key `offset` back, bool [B|1, T]; None under causal order alone."""
    found: Tensor | None = per_forward(call.run).get(("back", offset, mask_key(call)))
    return found


def _note_seen(block: RowBlock, offset: int, shift: int) -> None:
    """Find out, once a forward and mask, which rows of a block see the key `offset` back."""
    call = block.call
    if call.plain:
        return
    store, key = per_forward(block.run), ("back", offset, mask_key(call))
    part = visible_part(call, block.start, block.stop, block.key_start, block.key_stop)
    if part is None:
        rows, keys = block.stop - block.start, block.key_stop - block.key_start
        part = torch.ones(1, rows, keys, dtype=torch.bool, device=block.weights.device)
    band, first = diagonal(part, shift)
    seen = torch.zeros(len(part), call.query_length, dtype=torch.bool, device=part.device)
    if key in store:
        seen = seen | store[key]
    start = block.start + first
    seen[:, start : start + band.shape[-1]] = band
    store[key] = seen
