"""How large the values are, as they reach the residual stream: is what a sink says next to nothing?

    n_hj  = || W_O[:, h] v_{kv(h), j} ||_2
    drain = n_hs / mean_{j != s} n_hj            s the first real token; under 1 it is drained

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

from regard.lens.base import Place, SequenceLens, head_table
from regard.lens.projected import head_factors, projected_norms
from regard.lens.registry import lens
from regard.lens.sentences import number, where
from regard.lens.visible import mask_key, per_forward
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
    """

    definition = "norm of the values after the output projection; drain: first token / the others"
    source = "Guo et al. 2024, arXiv 2410.13835"
    needs = "it takes self-attention"

    anatomy: Any = field(default=None, init=False, repr=False)

    def check(self, anatomy: Anatomy) -> None:
        object.__setattr__(self, "anatomy", weakref.ref(anatomy))

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def inputs(self, call: Call) -> None:
        state = self.state(call.run, call.site, call.part)
        start = call.q_offset - call.kv_offset
        values = call.v[:, :, start : start + call.query_length]
        norms = projected_norms(values, head_factors(self.anatomy(), call))
        shares, begun, count = _shares(call, norms)
        if "others" not in state:
            state["first"], state["others"] = (norms.new_zeros(norms.shape[:2]) for _ in range(2))
            state["count"] = norms.new_zeros(len(norms))
            state["begun"] = norms.new_zeros(len(norms))
        first, others = torch.matmul(norms, shares).unbind(-1)
        state["first"] += first
        state["others"] += others
        state["begun"] += begun
        state["count"] += count

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "others" not in state:
            return
        first, others = state["first"].cpu().double(), state["others"].cpu().double()
        count, begun = state["count"].cpu().double(), state["begun"].cpu() > 0
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
        return head_table(HeadTable, self, values)

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        """Heads whose value at the first token is less than half as large as at the others."""
        drain = result["drain"][np.isfinite(result["drain"])]
        if not len(drain):
            return ()
        heads = where(result, "drain", lambda ratio: ratio < DRAINED)[::-1]
        said = (
            f"In {len(heads)} of {number(len(drain), 'head')} the first token's value is less than "
            f"half as large as the others' (a value drain); the median ratio is {np.median(drain):.2f}."
        )
        return (Finding(said, heads, "value-norm"),)


def _shares(call: Call, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where norms [B, H, T] are of a first real token, and where of another, and how many are.

    Returns:
        [B|1, T, 2] of ones and zeros, and its sums over T, both [B|1]; made once a forward.
    """
    store = per_forward(call.run)
    key = ("value norms", mask_key(call), norms.device)
    if key not in store:
        positions = call.query_positions
        others = positions > 0
        if call.valid_queries is not None:
            others = others & call.valid_queries
        shares = torch.stack([positions == 0, others], -1).to(norms)
        store[key] = shares, *shares.sum(1).unbind(-1), call.mask  # keeps the address in the key taken
    return store[key][:3]
