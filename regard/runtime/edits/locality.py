"""Whether an edit treats every row by itself, as edits must that do not survey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.errors import NothingObserved, RegardError
from regard.runtime.protocol import Edit, Lens
from regard.runtime.session import Session

if TYPE_CHECKING:
    from regard.runtime.call import Call

WHOLE = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class _BlockRows(Edit):
    """Sets how many query rows a block holds."""

    rows: int

    def inputs(self, call: Call) -> None:
        call.extra["block_rows"] = self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outputs(Lens):
    """Keeps the head outputs of every call, in order."""

    def head_outputs(self, call: Call) -> None:
        assert call.head_outputs is not None
        kept = call.head_outputs.detach().float().clone()
        if call.valid_queries is not None:
            kept = torch.where(call.valid_queries[:, None, :, None], kept, 0.0)
        self.tally.append(call.site, "outputs", kept)

    def result(self) -> dict[str, list[Tensor]]:
        return self.tally.get("outputs")


def check_row_local(
    model: nn.Module, edit: Edit, inputs: Mapping[str, Any], *, rows: int = 3, tolerance: float = 1e-4
) -> None:
    """Make sure that an edit gives the same whether it sees few rows at a time or all at once.

    Args:
        model: as for `steer`.
        edit: any edit; one that surveys is allowed to depend on all rows, and passes if it does so rightly.
        inputs: keyword arguments of a forward, of more than `rows` positions.
        rows: rows in a block on the one side; the other has all rows in one block.
        tolerance: allowed difference of head outputs, relative to the largest of the layer.

    Raises:
        RegardError: naming the first layer where the two differ, and by how much, or where an output is
            not finite.
        NothingObserved: where no call has more than `rows` query rows.
    """
    few = _outputs(model, edit, inputs, rows)
    whole = _outputs(model, edit, inputs, WHOLE)
    if all(x.shape[2] <= rows for outputs in whole.values() for x in outputs):
        raise NothingObserved(f"check_row_local needs inputs of more than {rows} positions.")
    for alias, outputs in whole.items():
        for one, other in zip(outputs, few[alias], strict=True):
            if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
                raise RegardError(f"{type(edit).__name__} makes head outputs that are not finite at {alias}.")
            gap, size = float((one - other).abs().max()), float(one.abs().max())
            if not gap <= tolerance * max(size, 1e-12):
                raise RegardError(
                    f"{type(edit).__name__} is not row-local: at {alias} its outputs in blocks of {rows} "
                    f"rows differ by {gap:.2g} (of {size:.2g}) from those of all rows at once. It must treat "
                    "each row by itself, or define survey(block) to see all rows first."
                )


def _outputs(model: nn.Module, edit: Edit, inputs: Mapping[str, Any], rows: int) -> dict[str, list[Tensor]]:
    stages = [_BlockRows(rows=rows), edit, _Outputs()]
    with torch.random.fork_rng(), torch.no_grad(), Session(model, stages) as session:
        torch.manual_seed(0)
        model(**inputs)
    return session[_Outputs]
