"""How far back attention reaches.

    d = sum_ij A_ij |i - j| / sum_ij A_ij           tokens

over the rows i, as the mean attention distance of "An Image is Worth 16x16 Words" (Dosovitskiy et al.,
2020, arXiv 2010.11929, appendix D.7) in one dimension. Under a causal mask |i - j| = i - j is linear in
both, so that d comes from row and column sums alone, with no further pass over the weights.
A sink logit's share has no distance and is left out of both sums. Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.engines.stats import masked_mass
from regard.lens.base import RowMeans
from regard.lens.columns import call_columns
from regard.lens.registry import lens
from regard.lens.sentences import largest
from regard.lens.visible import once
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted


@lens("mean-distance")
@dataclass(frozen=True, kw_only=True, eq=False)
class MeanDistance(RowMeans):
    """Measure the mean distance between a query and the keys it attends to.

    Columns: `distance` in tokens. Cross-attention, where distance means nothing, is left out. For an
    image's patches it is the distance in reading order.
    """

    columns = ("distance",)
    definition = "mean of |i - j| under the attention weights, in tokens"
    source = "Dosovitskiy et al. 2020, arXiv 2010.11929, in one dimension"
    needs = "it takes self-attention"

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def measure(self, block: RowBlock) -> tuple[Tensor, Tensor]:
        if block.call.causal:
            return block.row_sum, call_columns(block)
        queries = torch.arange(block.start, block.stop, device=block.weights.device)
        keys = torch.arange(block.key_start, block.key_stop, device=queries.device)
        keys = keys + (block.call.kv_offset - block.call.q_offset)
        apart = (queries[:, None] - keys[None, :]).abs().to(block.weights.dtype)[None]
        if block.valid_rows is not None:
            apart = apart * block.valid_rows[..., None]
        return block.row_sum, masked_mass(block.weights, apart)

    def total(self, call: Call, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([part for part, _ in parts], -1)
        if call.valid_queries is not None:
            rows = rows * call.valid_queries[:, None]
        rows = rows.sum(0).double()
        if not call.causal:
            return torch.stack([part for _, part in parts]).sum((0, 1))[None], rows.sum(-1)[None]
        columns = parts[-1][1].sum(0).double()
        queries, keys = once(call, "places", lambda: _places(call, rows.device))
        queries = queries[: rows.shape[-1]]
        return (rows @ queries - columns @ keys)[None], rows.sum(-1)[None]

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        words = "The head that looks furthest is {}, {} tokens away on average"
        return largest(result, "distance", words, "mean-distance")


def _places(call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the rows and the keys of a call stand, float64 [T] and [S], counted from its first row."""
    queries = torch.arange(call.query_length, device=device, dtype=torch.float64)
    keys = torch.arange(call.key_length, device=device, dtype=torch.float64)
    return queries, keys + (call.kv_offset - call.q_offset)
