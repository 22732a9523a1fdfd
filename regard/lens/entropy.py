"""How spread out attention is.

    H_i  = -sum_j A_ij log A_ij                 nats, in [0, log n_i]
    h_i  = H_i / log n_i                        in [0, 1]; n_i keys visible to row i, rows with n_i > 1

averaged over rows. The normalised form is the row entropy of "Active-Dormant Attention Heads:
Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo et al., 2024, arXiv 2410.13835), code
`LLM/src/entropy.py`, there with n_i = i + 1.
A sink logit's share is not counted: the sum is over keys. Status: agrees with the official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.lens.base import RowMeans
from regard.lens.registry import lens
from regard.lens.sentences import head
from regard.lens.visible import Visible, once, visible
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable


@lens("entropy")
@dataclass(frozen=True, kw_only=True, eq=False)
class Entropy(RowMeans):
    """Measure the mean entropy of a head's rows.

    Columns: `entropy` in nats, `normalised` by the log of how many keys a row can see.
    """

    columns = ("entropy", "normalised")
    definition = "mean over rows of -sum A log A; normalised by log of the visible keys"
    source = "Guo et al. 2024, arXiv 2410.13835"
    needs = "no attention was opened"

    def measure(self, block: RowBlock) -> tuple[Tensor, Visible]:
        return block.entropy, visible(block)

    def total(self, call: Call, parts: list[tuple[Tensor, Visible]]) -> tuple[Tensor, Tensor]:
        entropy = torch.cat([part for part, _ in parts], -1)
        batch, _, length = entropy.shape
        factors, counts = once(
            call, ("entropy", length), lambda: _factors(call, parts[-1][1].keys[:, :length], batch)
        )
        return torch.matmul(entropy, factors).sum(0).T, counts

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        low, high = result.top("normalised", 1, largest=False), result.top("normalised", 1)
        if not low:
            return ()
        said = (
            f"The most focused head is {head(low[0])}, at {low[0][2]:.0%} of the greatest possible entropy; "
        )
        said += f"the most even is {head(high[0])}, at {high[0][2]:.0%}."
        return (Finding(said, (low[0][:2], high[0][:2]), "entropy"),)


def _factors(call: Call, seen: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return what each row's entropy counts for, [B, T, 2], plainly and normalised, and of how many, [2, 1].

    Args:
        seen: how many keys each row sees, [B|1, T].
    """
    keep = torch.ones_like(seen) if call.valid_queries is None else call.valid_queries.to(seen.dtype)
    several = keep * (seen > 1)
    factors = torch.stack(torch.broadcast_tensors(keep, several / seen.clamp_min(2).log()), -1)
    counts = torch.stack([x.expand(batch, -1).sum() for x in (keep, several)])[:, None]
    return factors.expand(batch, -1, -1), counts
