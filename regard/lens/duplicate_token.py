"""How much a head attends to earlier occurrences of the current token.

    s = mean over rows i that have one of  sum_{j < i, t_j = t_i} A_ij

The duplicate-token heads of "Interpretability in the Wild: a Circuit for Indirect Object Identification
in GPT-2 small" (Wang et al., 2022, arXiv 2211.00593). A sink logit's share counts as mass that went
elsewhere. Status: agrees with the paper, on any text rather than on its template.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.engines.rows import RowBlock
from regard.lens.base import RowMeans
from regard.lens.matches import Matches, match_mass, match_total, tokens_of
from regard.lens.registry import lens
from regard.lens.sentences import strongest
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted


@lens("duplicate-token")
@dataclass(frozen=True, kw_only=True, eq=False)
class DuplicateToken(RowMeans):
    """Measure the attention to all earlier occurrences of the current token.

    Columns: `score`, and `chance`, the same for attention spread evenly over the keys a row can see.
    Rows whose token is new, or stood only where the row cannot see, are not counted.
    """

    columns = ("score", "chance")
    definition = "mean attention to earlier occurrences of the current token, over rows that have one"
    source = "Wang et al. 2022, arXiv 2211.00593"
    needs = "it takes self-attention over token ids"

    def wants(self, call: Call) -> Wanted | None:
        return None if tokens_of(call) is None else EVERYTHING

    def measure(self, block: RowBlock) -> tuple[Tensor, Matches]:
        return match_mass(block, 0)

    def total(self, call: Call, parts: list[tuple[Tensor, Matches]]) -> tuple[Tensor, Tensor]:
        return match_total(parts)

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        return strongest(result, "the same token earlier", "duplicate-token")
