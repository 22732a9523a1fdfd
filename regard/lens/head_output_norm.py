"""How much each head writes into the residual stream.

    n_h = mean over rows i of || W_O[:, h] sum_j A_ij v_j ||_2

the norm-based view of "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms"
(Kobayashi et al., 2020, arXiv 2004.10102), taken of the whole output of a head rather than of each
summand. A bias of the projection is not counted. Status: our choice.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from regard.lens.base import Measure, head_table
from regard.lens.projected import projected_norms
from regard.lens.registry import lens
from regard.lens.sentences import largest
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable


@lens("head-output-norm")
@dataclass(frozen=True, kw_only=True, eq=False)
class HeadOutputNorm(Measure):
    """Measure the norm of head outputs after the output projection.

    Columns: `norm`, the mean over real rows; `largest`, the largest of any row. Needs no attention
    weights. Norms are taken of what edits left.
    """

    definition = "norm of a head's output after the output projection"
    source = "Kobayashi et al. 2020, arXiv 2004.10102"
    needs = "no attention was run"

    anatomy: Any = field(default=None, init=False, repr=False)

    def check(self, anatomy: Anatomy) -> None:
        object.__setattr__(self, "anatomy", weakref.ref(anatomy))

    def head_outputs(self, call: Call) -> None:
        assert call.head_outputs is not None
        norms = projected_norms(call.head_outputs, self.anatomy(), call)
        count: float = norms.shape[0] * norms.shape[2]
        if call.valid_queries is not None:
            norms = norms * call.valid_queries[:, None]
            count = float(call.valid_queries.sum())
        self.tally.mean(call.site, "norm", norms.sum((0, 2)), count)
        self.tally.largest(call.site, "largest", norms.amax((0, 2)))

    def result(self) -> HeadTable:
        """Return one row a head.

        Raises:
            NothingObserved: where no attention was seen.
        """
        norm, largest = self.tally.get("norm"), self.tally.get("largest")
        values = {alias: {"norm": norm[alias], "largest": largest[alias]} for alias in norm}
        return head_table(HeadTable, self, values)

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        words = "The head that writes most is {}, with a mean norm of {}"
        return largest(result, "norm", words, "head-output-norm")
