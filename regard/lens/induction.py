"""How much a head attends to the token after an earlier occurrence of the current one.

    s = mean over rows i that have one of  sum_{j < i, t_{j-1} = t_i} A_ij

The prefix-matching score of "In-context Learning and Induction Heads" (Olsson et al., 2022,
arXiv 2209.11895), which takes it on random tokens repeated four times; here on any text, all earlier
occurrences summed. On repeated random tokens a head that merely looks one period back scores as high: see
`MeanDistance` and `DuplicateToken` beside it. A sink logit's share counts as mass that went elsewhere.
Status: agrees with the paper.
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


@lens("induction")
@dataclass(frozen=True, kw_only=True, eq=False)
class Induction(RowMeans):
    """Measure the attention to all tokens that follow an earlier occurrence of the current token.

    Columns: `score`, and `chance`, the same for attention spread evenly over the keys a row can see.
    Rows whose token is new are not counted; a row's own key is not either, where a token comes twice
    in a row.
    """

    columns = ("score", "chance")
    definition = "mean attention to what followed the current token earlier, over rows that have such"
    source = "Olsson et al. 2022, arXiv 2209.11895"
    needs = "it takes self-attention over token ids"

    def wants(self, call: Call) -> Wanted | None:
        return None if tokens_of(call) is None else EVERYTHING

    def measure(self, block: RowBlock) -> tuple[Tensor, Matches]:
        return match_mass(block, 1)

    def total(self, call: Call, parts: list[tuple[Tensor, Matches]]) -> tuple[Tensor, Tensor]:
        return match_total(parts)

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        return strongest(result, "what followed the same token earlier", "induction")
