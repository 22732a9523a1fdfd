"""What a routed or sparse mechanism looked at, and what it missed.

With A the softmax attention of the call's own queries and keys over all that its mask shows, R_i the keys
that row i of a mechanism reads, and n_i those that it could:

    kept     = mean_i  sum_{j in R_i} A_ij / sum_j A_ij
    recall   = mean_i  |R_i and top_i| / |top_i|            top_i: the `top` keys of the largest A_ij
    read     = mean_i  |R_i| / n_i                          what as many keys at random keep, and recall
    nearest, oracle = as kept, of the |R_i| nearest and of the |R_i| heaviest keys
    coverage = share of the keys that any row of a sequence reads

`kept` and `recall` are the diagnostics of "A Training-free Sub-quadratic Cost Transformer Model Serving
Framework With Hierarchically Pruned Attention" (Lee et al., 2024, arXiv 2406.09827), which chooses blocks of
keys; the oracle chooses key by key and for every row, so that no choice of blocks need reach it. Mean over
rows, heads apart. Status: our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.attention.mechanism import LookedAt
from regard.attention.select import kept_mass, nearest_scores, recall
from regard.engines.rows import RowBlock, row_blocks, softmax
from regard.errors import RegardError
from regard.lens.base import Place, SequenceLens, head_table, room
from regard.lens.registry import lens
from regard.lens.sentences import head, number
from regard.lens.visible import visible_part
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted, defines
from regard.runtime.tally import Tally

MEANS = ("kept", "recall", "read", "nearest", "oracle")


@lens("routed")
@dataclass(frozen=True, kw_only=True, eq=False)
class Routed(SequenceLens):
    """Compare the keys that a swapped-in mechanism reads with the dense attention of the same call.

    Columns: `kept`, the share of dense attention that falls on what was read; `recall`, the share of each
    row's heaviest keys that was read; `read`, the share of keys read, which is also what as many random keys
    keep and recall; `nearest` and `oracle`, what as many nearest and heaviest keys keep; `coverage`, the
    share of keys that any row read. All are 1 where a layer reads all that its mask shows. Cross-attention
    is left out, and steps that decode from a state, where earlier keys are gone.

    Attributes:
        top: how many heaviest keys of a row `recall` asks for.
    """

    definition = "share of dense attention on the keys read; of the top keys; beside as many nearest, best"
    source = "Lee et al. 2024, arXiv 2406.09827"
    needs = "it takes self-attention over keys that are still there"
    top: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.top, int) or isinstance(self.top, bool) or self.top < 1:
            raise RegardError(f"top is {self.top!r}; it must be a number of keys, from 1.")

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def end_call(self, call: Call) -> None:
        if call.carried is not None and call.carried.length > call.query_length:
            return
        looked = _looked_at(call)
        if looked is None:
            self._all(call)
            return
        state = self.state(call.run, call.site, call.part)
        for block in row_blocks(call, memory=call.run.memory):
            call.annotate(block)
            softmax(call, block)
            seen = _visible(block)
            chosen = looked(block.start, block.stop)[..., block.key_start : block.key_stop]
            chosen = (chosen & seen[:, None]).expand(block.weights.shape)
            keep = seen.any(-1) if block.valid_rows is None else seen.any(-1) & block.valid_rows
            means = torch.stack(_measures(block, chosen, seen, self.top))
            keep = keep.expand(len(chosen), -1)
            total = (means.double() * keep[:, None]).sum((1, 3))
            self.tally.mean(call.site, "means", total, keep.sum())
            _cover(state, block, chosen & keep[:, None, :, None], seen & keep[..., None])

    def _all(self, call: Call) -> None:
        """Count the rows of a call that reads all that it may."""
        valid = call.valid_queries
        rows = call.q.shape[0] * call.query_length if valid is None else int(valid.sum())
        ones = torch.ones(len(MEANS), call.heads)
        self.tally.mean(call.site, "means", ones * rows, rows)
        self.tally.mean(call.site, "coverage", ones[0] * len(call.q), len(call.q))

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "covered" not in state:
            return
        reachable = state["reachable"].sum(-1).cpu().double()
        share = state["covered"].sum(-1).cpu().double() / reachable.clamp_min(1)[:, None]
        tally.mean(place, "coverage", share.sum(0), float((reachable > 0).sum()))

    def result(self) -> HeadTable:
        """Return one row a head.

        Raises:
            NothingObserved: where no self-attention was seen.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        means, covered = tally.get("means"), tally.get("coverage")
        values = {
            alias: {**dict(zip(MEANS, found, strict=True)), "coverage": covered[alias]}
            for alias, found in means.items()
        }
        return head_table(HeadTable, self, values, {"top": self.top})

    @classmethod
    def findings(cls, result: HeadTable) -> tuple[Finding, ...]:
        """The head that misses the most, beside its controls; nothing where all was read."""
        rows = np.flatnonzero(result["read"] < 1)
        if not len(rows):
            return ()
        ranked = [row for row in result.top("kept", len(result), largest=False) if row[2] < 1]
        if not ranked:
            return ()
        worst = ranked[0]
        at = result.at(worst[0], worst[1])
        said = (
            f"{number(len(rows), 'head')} read {np.mean(result['read'][rows]):.0%} of the keys, which hold "
            f"{np.mean(result['kept'][rows]):.0%} of dense attention; {head(worst)} misses the most: it "
            f"reads {at['read']:.0%}, which hold {at['kept']:.0%}, and as many nearest keys "
            f"{at['nearest']:.0%}, the heaviest {at['oracle']:.0%}."
        )
        return (Finding(said, (worst[:2],), "routed"),)


def _looked_at(call: Call) -> LookedAt | None:
    """What says which keys rows of a call read; None where they read all that they may."""
    for edit in reversed(call.served):
        if defines(edit, "looked_at"):
            found: LookedAt | None = edit.looked_at(call)  # type: ignore[attr-defined]
            return found
    return None


def _visible(block: RowBlock) -> Tensor:
    """Which keys of a block its rows may see, bool [B|1, R, K]."""
    part = visible_part(block.call, block.start, block.stop, block.key_start, block.key_stop)
    if part is None:
        shape = (1, block.stop - block.start, block.key_stop - block.key_start)
        return torch.ones(shape, dtype=torch.bool, device=block.weights.device)
    return part


def _measures(block: RowBlock, chosen: Tensor, seen: Tensor, top: int) -> list[Tensor]:
    """What `MEANS` names, of each row, [B, H, R] each."""
    weights, count = block.weights, chosen.sum(-1)
    total = weights.sum(-1)
    whole = torch.where(total > 0, total, 1.0)
    near, heavy = _nearest(block, count, seen), _heaviest(weights, count)
    return [
        kept_mass(weights, chosen),
        recall(weights, chosen, top, seen[:, None]),
        count / seen.sum(-1).clamp_min(1)[:, None],
        near / whole,
        heavy / whole,
    ]


def _heaviest(weights: Tensor, count: Tensor) -> Tensor:
    """The sum of the `count` largest weights of each row, [B, H, R]."""
    most = int(count.max()) if count.numel() else 0
    if not most:
        return torch.zeros_like(weights[..., 0])
    sums = weights.topk(most, -1).values.cumsum(-1)
    return sums.gather(-1, (count - 1).clamp_min(0)[..., None])[..., 0] * (count > 0)


def _nearest(block: RowBlock, count: Tensor, seen: Tensor) -> Tensor:
    """The sum of the weights of each row's `count` nearest visible keys, [B, H, R]."""
    call, device = block.call, block.weights.device
    rows = torch.arange(block.start, block.stop, device=device) + call.q_offset - call.kv_offset
    keys = torch.arange(block.key_start, block.key_stop, device=device)
    order = nearest_scores(rows, keys).sort(dim=-1, descending=True, stable=True).indices
    inside = seen.gather(-1, order.expand(len(seen), -1, -1))
    rank = inside.cumsum(-1)[:, None]
    weights = block.weights.gather(-1, order.expand(block.weights.shape))
    return (weights * (inside[:, None] & (rank <= count[..., None]))).sum(-1)


def _cover(state: dict[str, Any], block: RowBlock, chosen: Tensor, seen: Tensor) -> None:
    """Note which keys any row reads, `covered` [B, H, positions], and could, `reachable` [B, positions]."""
    call, (batch, heads) = block.call, chosen.shape[:2]
    positions = call.kv_offset + call.key_length
    some = slice(call.kv_offset + block.key_start, call.kv_offset + block.key_stop)
    room(state, "covered", (batch, heads, positions), chosen)[..., some] |= chosen.any(2)
    room(state, "reachable", (batch, positions), seen)[:, some] |= seen.any(1)
