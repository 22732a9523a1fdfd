"""How large the values are, as they reach the residual stream: is what a sink says next to nothing?

    n_hj  = || W_O[:, h] v_{kv(h), j} ||_2
    drain = n_hs / mean_{j != s} n_hj            s the sink, by default the first real token; under 1 it is
                                                 drained

The value-state drain of "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token
Phenomena in LLMs" (Guo et al., 2024, arXiv 2410.13835), which measures after the output projection, by
query head. A bias of the projection is not counted, nor a gate between the heads and the projection.
Status: agrees with the official code; its figures drop the lowest and highest 1 %, this does not.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.lens.base import Place, SequenceLens, accumulate, check_position, head_table
from regard.lens.projected import projected_norms
from regard.lens.registry import lens
from regard.lens.sentences import number, token, where
from regard.lens.visible import once
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted
from regard.runtime.tally import Tally

DRAINED = 0.5


@lens("value-norm")
@dataclass(frozen=True, kw_only=True, eq=False)
class ValueNorm(SequenceLens):
    """Measure the norm of values after the output projection, first token against the others.

    Columns: `first` and `others`, the norms, and `drain`, their ratio, each averaged over sequences.
    Needs no attention weights. Cross-attention is left out. Keys of an earlier forward, in a cache, were
    counted when they were made.

    Attributes:
        position: the token held against the others, counted from the first real one, 0.
    """

    definition = "norm of the values after the output projection; drain: first token / the others"
    source = "Guo et al. 2024, arXiv 2410.13835"
    needs = "it takes self-attention"

    position: int = 0
    anatomy: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_position(self.position)

    def check(self, anatomy: Anatomy) -> None:
        object.__setattr__(self, "anatomy", weakref.ref(anatomy))

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def inputs(self, call: Call) -> None:
        state = self.state(call.run, call.site, call.part)
        start = call.q_offset - call.kv_offset
        values = call.v[:, :, start : start + call.query_length]
        norms, place = projected_norms(values, self.anatomy(), call), self.position
        shares, rows = once(
            call, ("value norms", place, norms.device), lambda: _shares(call, norms.device, place)
        )
        accumulate(state, "sums", torch.matmul(norms, shares))
        accumulate(state, "rows", rows)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "sums" not in state:
            return
        first, others = state["sums"].cpu().double().unbind(-1)
        begun, count = state["rows"].cpu().double().unbind(-1)
        begun = begun > 0
        mean = others / count[:, None]
        both = begun & (count > 0)
        tally.mean(place, "first", first[begun].sum(0), float(begun.sum()))
        tally.mean(place, "others", mean[count > 0].sum(0), float((count > 0).sum()))
        tally.mean(place, "drain", (first / mean)[both].sum(0), float(both.sum()))

    def result(self) -> HeadTable:
        """Return one row a head.

        Raises:
            NothingObserved: where no self-attention was seen.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        columns = {name: tally.get(name) for name in ("drain", "first", "others")}
        values = {a: {name: found[a] for name, found in columns.items()} for a in columns["first"]}
        return head_table(HeadTable, self, values, {"position": self.position})

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        """Heads whose value at the first token is less than half as large as at the others."""
        drain = result["drain"][np.isfinite(result["drain"])]
        if not len(drain):
            return ()
        heads = where(result, "drain", lambda ratio: ratio < DRAINED)[::-1]
        it = token(result.about.get("position", 0))
        said = (
            f"In {len(heads)} of {number(len(drain), 'head')} {it}'s value is less than "
            f"half as large as the others' (a value drain); the median ratio is {np.median(drain):.2f}."
        )
        return (Finding(said, heads, "value-norm"),)


def _shares(call: Call, device: torch.device, place: int) -> tuple[Tensor, Tensor]:
    """Return where a call's rows are the real token at a position, and where another, and how many are.

    Returns:
        float32 [B|1, T, 2] of ones and zeros, and its sum over T, [B, 2].
    """
    positions = call.query_positions
    others = (positions >= 0) & (positions != place)
    if call.valid_queries is not None:
        others = others & call.valid_queries
    shares = torch.stack([positions == place, others], -1).to(device, torch.float32)
    return shares, shares.sum(1).expand(call.q.shape[0], -1)
