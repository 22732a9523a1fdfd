"""What heads of the circuit of indirect objects do, told by where they look and what they write.

    mover            at END looks at IO, and writes what raises the logit difference
    negative mover   at END looks at IO, and writes what lowers it
    suppressor       at END looks at S, and writes what raises it
    inhibition       at END looks at S2, and writes little
    duplicate        at S2 looks at S1              induction   at S2 looks at S1+1
    previous         at S1+1 looks at S1
    backup mover     at END looks at IO and writes little; with the movers off, what raises it

A head looks at a place where the mean weight is at least a threshold, 0.3 by default; it writes where the
size of its direct effect is at least another, 0.1 logits. A head may have several roles, or none.

Source: Wang et al., 2023, arXiv 2211.00593, sections 3.1 to 3.3. Status: partly our choice (the thresholds,
and the suppressor, which Merullo et al., 2024, arXiv 2310.08744, describe in GPT-2 Medium).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from regard.engines.rows import RowBlock
from regard.errors import ShapeMismatch
from regard.lens.base import Measure
from regard.runtime.attribution import attribute_logits
from regard.runtime.call import Call
from regard.runtime.edits import ScaleHeads
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.protocol import EVERYTHING, Wanted
from regard.runtime.session import Session
from regard.tasks.prompts import Prompts

LOOKS, WRITES = 0.3, 0.1
PAIRS = (("END", "IO"), ("END", "S1"), ("END", "S2"), ("S2", "S1"), ("S2", "S1+1"), ("S1+1", "S1"))


@dataclass(frozen=True, kw_only=True, eq=False)
class PlaceAttention(Measure):
    """Measure the mean weight from one place of each sequence to another.

    Attributes:
        pairs: name of the column -> (query positions [B], key positions [B]), array indices of one forward
            without padding before them.
    """

    definition: ClassVar[str] = "mean attention from one named place to another"
    source: ClassVar[str] = "Wang et al. 2023, arXiv 2211.00593"
    needs: ClassVar[str] = "no self-attention over these places was opened"

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def wants(self, call: Call) -> Wanted | None:
        return None if call.site.cross else EVERYTHING

    def weights(self, block: RowBlock) -> None:
        batch = block.weights.shape[0]
        for name, (queries, keys) in self.pairs.items():
            if len(queries) != batch or len(keys) != batch:
                raise ShapeMismatch(f"{name} has {len(queries)} places for a batch of {batch}.")
            row, column = queries - block.start, keys - block.key_start
            inside = (row >= 0) & (row < block.weights.shape[2]) & (column >= 0)
            inside &= column < block.weights.shape[3]
            here = (queries >= block.start) & (queries < block.stop)
            some = inside.nonzero()[:, 0]
            found = block.weights[some, :, row[some], column[some]].sum(0)
            self.tally.mean(block.site, name, found, float(here.sum()))

    def result(self) -> HeadTable:
        """Return one column a pair of places."""
        return HeadTable.from_tally(self.tally, {name: name for name in self.pairs})


def label_heads(model: nn.Module, prompts: Prompts, *, off: Sequence[Head] = ()) -> HeadTable:
    """Return where each head looks, and what it writes, over prompts of indirect objects.

    Args:
        model: a causal language model in evaluation mode, whose logits can be taken apart.
        prompts: of `regard.tasks.ioi`.
        off: heads to hold at their mean output in a second run, such as the movers: what takes their place?

    Returns:
        Columns `END>IO`, `END>S1`, `END>S2`, `S2>S1`, `S2>S1+1`, `S1+1>S1`, mean weights, and `direct`, the
        mean direct effect on the logit difference, in logits; with `off` also `direct off`, the same in the
        second run.

    Example:
        >>> roles_of(label_heads(model, ioi(tokenizer, 32)))["mover"]           # doctest: +SKIP
    """
    tables, counts = [], []
    for part in prompts.by_length():
        pairs = {f"{a}>{b}": (part.places(a), part.places(b)) for a, b in PAIRS}
        ids = part.ids()
        with torch.no_grad(), Session(model, [PlaceAttention(pairs=pairs)]) as session:
            model(input_ids=ids, use_cache=False)
        answers = torch.tensor([[*pair.correct, *pair.wrong] for pair in part.pairs])
        direct = attribute_logits(model, {"input_ids": ids}, answers).net().table("direct")
        looked = session[PlaceAttention]
        tables.append({**looked.columns, "direct": direct["direct"]})
        if off:
            with Session(model, [ScaleHeads(heads=list(off), mode="mean")]):
                again = attribute_logits(model, {"input_ids": ids}, answers).net().table("direct")
            tables[-1]["direct off"] = again["direct"]
        counts.append(len(part))
        names = direct
    columns = {key: np.average([table[key] for table in tables], axis=0, weights=counts) for key in tables[0]}
    return HeadTable(names.sites, names.heads, columns, {"prompts": len(prompts)})


def roles_of(table: HeadTable, *, looks: float = LOOKS, writes: float = WRITES) -> dict[str, list[Head]]:
    """Return the heads of each role, of what `label_heads` gave.

    Args:
        looks: least mean weight to look at a place.
        writes: least |direct effect| to write.

    Example:
        >>> columns = {f"{a}>{b}": [0.0] for a, b in PAIRS} | {"direct": [0.5], "END>IO": [0.9]}
        >>> roles_of(HeadTable.from_columns({"text.0": columns}))["mover"]
        [('text.0', 0)]
    """
    seen = {f"{a}>{b}": table[f"{a}>{b}"] >= looks for a, b in PAIRS}
    direct = table["direct"]
    subject = seen["END>S1"] | seen["END>S2"]
    chosen = {
        "mover": seen["END>IO"] & (direct >= writes),
        "negative mover": seen["END>IO"] & (direct <= -writes),
        "suppressor": subject & ~seen["END>IO"] & (direct >= writes),
        "inhibition": seen["END>S2"] & (np.abs(direct) < writes),
        "duplicate": seen["S2>S1"],
        "induction": seen["S2>S1+1"],
        "previous": seen["S1+1>S1"],
    }
    if "direct off" in table.columns:
        chosen["backup mover"] = seen["END>IO"] & (direct < writes) & (table["direct off"] >= writes)
    return {role: [table.names[i] for i in np.flatnonzero(mask)] for role, mask in chosen.items()}
