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
from regard.lens.registry import lens
from regard.runtime.call import Call
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
        call = block.call
        origin = call.q_offset + block.start
        queries = torch.arange(block.stop - block.start, device=block.weights.device)
        keys = torch.arange(block.key_start, block.key_stop, device=queries.device)
        keys = keys + (call.kv_offset - origin)
        row_sum = block.row_sum
        if block.valid_rows is not None:
            row_sum = row_sum * block.valid_rows[:, None]
        if call.causal:
            ahead = (row_sum.sum(0) @ queries.to(row_sum.dtype)).double()
            total = ahead - block.column_sum.sum(0).double() @ keys.double()
        else:
            apart = (queries[:, None] - keys[None, :]).abs().to(row_sum.dtype)[None]
            if block.valid_rows is not None:
                apart = apart * block.valid_rows[..., None]
            total = masked_mass(block.weights, apart).sum(0)
        return total[None], row_sum.sum((0, 2))[None]
