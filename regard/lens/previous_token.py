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
from regard.lens.visible import visible
from regard.runtime.call import Call
from regard.runtime.protocol import EVERYTHING, Wanted


@lens("previous-token")
@dataclass(frozen=True, kw_only=True, eq=False)
class PreviousToken(RowMeans):
    """Measure the mean attention to the token a fixed distance back.

    Columns: `score`, and `chance`, what it would be were each row spread evenly over what it can see.

    Attributes:
        offset: how far back; rows with no token that far back are not counted.
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

    def measure(self, block: RowBlock) -> tuple[Tensor, Tensor]:
        call = block.call
        shift = call.q_offset + block.start - self.offset - call.kv_offset - block.key_start
        band, first = diagonal(block.weights, shift)
        rows = slice(first, first + band.shape[-1])
        keep = block.query_positions >= self.offset
        keep = keep if block.valid_rows is None else keep & block.valid_rows
        seen = visible(block).keys[:, block.start : block.stop]
        even = (keep / seen.clamp_min(1)).expand(band.shape[0], -1).sum()
        count = keep.expand(band.shape[0], -1).sum()
        total = (band * keep[:, None, rows]).sum((0, 2)) if bool(band.shape[-1]) else band.sum((0, 2))
        return torch.stack([total, even.expand_as(total)]), count.expand(2)[:, None]
