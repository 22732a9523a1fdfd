"""How far the score of the sink stands above a row's other scores, before the softmax.

    delta_i = S_is - mean_{j != s} S_ij          rows i after the sink s, over the keys j that row i can see
    spread  = std_i delta_i
    plain   = sqrt( mean_{i, j != s} (S_ij - mean_{j != s} S_ij)^2 )

The sink logit of "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in
LLMs" (Guo et al., 2024, arXiv 2410.13835), whose sink logits concentrate: delta is nearly one number for
every query, so that `spread` is small beside `plain`, how far a row's ordinary scores lie apart. Scores are
scaled, capped and biased as the model does. The row of the sink itself does not count, nor one that cannot
see it. Status: partly our choice (`plain` is taken about each row's own mean, as the softmax undoes shifts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.lens.base import Measure, check_position, head_table
from regard.lens.registry import lens
from regard.lens.sentences import head, number, size, token, where
from regard.lens.visible import visible_part
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted

CONCENTRATED = 0.5
ABOVE = 1.0
SUMS = ("delta", "squares", "plain")


@lens("sink-logit")
@dataclass(frozen=True, kw_only=True, eq=False)
class SinkLogit(Measure):
    """Measure the score of one key against the others, and how much it varies from row to row.

    Columns: `delta`, `spread` and `plain`. A row counts once, whichever sequence, forward or decoding step
    it is of. Cross-attention is left out. NaN where no row could see the key and another.

    Attributes:
        position: the key asked about, counted from the first real token, 0.
    """

    definition = "score of the key minus the mean of the row's others; its deviation beside theirs"
    source = "Guo et al. 2024, arXiv 2410.13835"
    needs = "it takes self-attention with scores"

    position: int = 0

    def __post_init__(self) -> None:
        check_position(self.position)

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def scores(self, block: RowBlock) -> None:
        sink, others, rows = _keys(block, self.position)
        scores = block.scores
        at_sink = torch.where(sink, scores, 0.0).sum(-1)
        count = others.sum(-1)
        mean = torch.where(others, scores, 0.0).sum(-1) / count.clamp_min(1)
        delta = torch.where(rows, at_sink - mean, 0.0)
        plain = torch.where(others & rows[..., None], scores - mean[..., None], 0.0).square()
        sums = torch.stack([delta, delta.square(), plain.sum(-1)])
        heads = scores.shape[1]
        seen, pairs = (x.expand(len(scores), heads, -1).sum((0, 2)) for x in (rows, count * rows))
        self.tally.mean(block.site, "sums", sums.double().sum((1, 3)), torch.stack([seen, seen, pairs]).cpu())

    def result(self) -> HeadTable:
        """Return one row a head.

        Raises:
            NothingObserved: where no self-attention was seen.
        """
        values = {}
        for alias, (delta, squares, plain) in self.tally.get("sums").items():
            spread = (squares - delta.square()).clamp_min(0).sqrt()
            values[alias] = {"delta": delta, "spread": spread, "plain": plain.sqrt()}
        return head_table(HeadTable, self, values, {"position": self.position})

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        """Heads whose sink's score is well above the others, and how many of them hold it level."""
        heads = where(result, "delta", lambda delta: delta > ABOVE)
        if not np.isfinite(result["delta"]).any():
            return ()
        it = token(result.about.get("position", 0))
        if not heads:
            top = result.top("delta", 1)[0]
            said = (
                f"In no head {it}'s score stands over {ABOVE:g} above the others': at most {size(top[2])}, "
            )
            return (Finding(said + f"in {head(top)}.", (top[:2],), "sink-logit"),)
        rows = [result.at(*name) for name in heads]
        level = sum(row["spread"] < CONCENTRATED * row["plain"] for row in rows)
        said = (
            f"In {number(len(heads), 'head')} {it}'s score stands over {ABOVE:g} above the others'; in "
            f"{level} of them it varies less than half as much from row to row as a row's other scores do."
        )
        return (Finding(said, heads, "sink-logit"),)


def _keys(block: RowBlock, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which keys are the sink and which others a row sees, [B|1, 1, R, K], and which rows count."""
    call = block.call
    keys = block.key_positions[:, None, None, :] == place
    part = visible_part(call, block.start, block.stop, block.key_start, block.key_stop)
    seen = torch.ones_like(keys) if part is None else part[:, None]
    rows = block.query_positions
    rows = rows > place if call.causal else rows != place
    if block.valid_rows is not None:
        rows = rows & block.valid_rows
    sink, others = torch.broadcast_tensors(keys & seen, ~keys & seen)
    if block.valid_keys is not None:
        others = others & block.valid_keys[:, None, None, :]
    return sink, others, rows[:, None] & sink.any(-1) & others.any(-1)
