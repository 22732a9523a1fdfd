"""What attention does while any model trains: entropy, weight on common tokens, and how fast it moves.

Of fixed probes, layer by layer and head by head, at every so many steps:

    entropy     mean over rows of -sum_j A_ij ln A_ij, in nats
    open        the same with the first key left out and the row made to sum to 1 again
    common      mean over rows of sum of A_ij over keys whose token is flagged common
    speed       mean over rows of sum_j | A_ij - A_ij before |

Rows include the token's own key; the first row, which sees itself alone, is left out.

Source: the quantities of "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer
Transformer" (Tian et al., 2023, arXiv 2305.16380), there of one layer. Status: partly our choice (`open`,
as a pretrained model's attention rests mostly on its first token).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from regard.engines.rows import RowBlock
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.protocol import Lens
from regard.runtime.table import Table
from regard.runtime.verbs import watch

COLUMNS = ("entropy", "open", "common", "speed")
STILL = 0.05


class AttentionTracker(TrainerCallback):
    """Takes note of attention during training; a callback of the Hugging Face Trainer, or called by hand.

    Args:
        model: any model whose attention regard can reach; its mode is kept.
        probes: token ids, int64 [B, T], of two tokens or more, the same at every look.
        every: steps between looks.
        common: token ids that are common; default none, and the column is NaN.
        out: a `.csv` or `.json` file, written when the training ends.

    Attributes:
        rows: one dict a look, layer and head: `step`, `site`, `head`, and the columns above; `speed` is NaN
            at the first look.

    Raises:
        RegardError: for an interval under 1, or a file of another ending.
        ShapeMismatch: for probes of another shape.

    Example:
        >>> tracker = AttentionTracker(model, ids, every=20)            # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[tracker]).train()   # doctest: +SKIP
        >>> tracker.table, tracker.snap("text.0")                       # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, probes: Tensor, *, every: int = 10, common: Collection[int] | None = None,
        out: str | Path | None = None,
    ) -> None:  # fmt: skip
        if every < 1:
            raise RegardError(f"every is {every}; it must be at least 1.")
        if probes.ndim != 2 or probes.shape[1] < 2 or probes.is_floating_point():
            shape = list(probes.shape)
            raise ShapeMismatch(f"probes must be int64 [B, T] of two tokens or more, and are {shape}.")
        if out is not None and Path(out).suffix not in (".csv", ".json"):
            raise RegardError(f"out is {out}; it must end in .csv or .json.")
        self.model, self.probes, self.every = model, probes, every
        self.common = None if common is None else torch.tensor(sorted(common))
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self._before: dict[str, Tensor] = {}

    @property
    def table(self) -> Table:
        """One row a look, layer and head."""
        names = ("step", "site", "head", *COLUMNS)
        return Table({name: [row[name] for row in self.rows] for name in names})

    def record(self, step: int) -> None:
        """Look at the model now, and write down what there is to see as of a step."""
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), watch(self.model, _Weights()) as seen:
                self.model(input_ids=self.probes.to(device))
        finally:
            self.model.train(was_training)
        for site, weights in seen[_Weights].items():
            for head, found in enumerate(self._seen(site, weights)):
                self.rows.append({"step": step, "site": site, "head": head, **found})

    def mean(self, column: str, site: str | None = None) -> list[tuple[int, float]]:
        """Return (step, mean over heads) of a column, of one site or of all.

        Raises:
            RegardError: for a column that there is not.
        """
        if column not in COLUMNS:
            raise RegardError(f"no column {column!r}; there are {', '.join(COLUMNS)}.")
        found: dict[int, list[float]] = {}
        for row in self.rows:
            if site in (None, row["site"]):
                found.setdefault(row["step"], []).append(row[column])
        return [(step, sum(values) / len(values)) for step, values in found.items()]

    def snap(self, site: str | None = None) -> int | None:
        """Return the step from which on the speed stays below 5 % of its peak; None where it never does."""
        speeds = [(step, value) for step, value in self.mean("speed", site) if value == value]
        peak = max((value for _, value in speeds), default=0.0)
        still = None
        for step, value in reversed(speeds):
            if value >= STILL * peak:
                break
            still = step
        return still

    def save(self, path: str | Path) -> None:
        """Write the table as CSV or JSON, by the file's ending."""
        (self.table.to_csv if Path(path).suffix == ".csv" else self.table.to_json)(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.record(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.out is not None:
            self.save(self.out)

    def _seen(self, site: str, weights: Tensor) -> Iterable[dict[str, float]]:
        """Return the columns of each head of weights [B, H, T, T]."""
        rows = weights[:, :, 1:].double().cpu()
        rest = rows[..., 1:]
        opened = rest / rest.sum(-1, keepdim=True).clamp_min(1e-12)
        before = self._before.get(site)
        self._before[site] = rows
        nothing = torch.full_like(rows[..., 0], float("nan"))
        common = nothing
        if self.common is not None:
            flagged = torch.isin(self.probes.cpu(), self.common)
            common = (rows * flagged[:, None, None]).sum(-1)
        speed = nothing if before is None else (rows - before).abs().sum(-1)
        each = torch.special.entr(rows).sum(-1), torch.special.entr(opened).sum(-1), common, speed
        means = torch.stack(each).mean((1, 3))  # [columns, H]
        return [dict(zip(COLUMNS, column.tolist(), strict=True)) for column in means.T]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weights(Lens):
    """Keeps all weights of a forward, [B, H, T, S] a site."""

    def weights(self, block: RowBlock) -> None:
        call = block.call
        if "tracked" not in call.extra:
            shape = (*block.weights.shape[:2], call.query_length, call.key_length)
            call.extra["tracked"] = block.weights.new_zeros(shape)
        place = (..., slice(block.start, block.stop), slice(block.key_start, block.key_stop))
        call.extra["tracked"][place] = block.weights

    def end_call(self, call: Any) -> None:
        if "tracked" in call.extra:
            self.tally.append(call.site, "weights", call.extra.pop("tracked"))

    def result(self) -> dict[str, Tensor]:
        return {site: parts[-1] for site, parts in self.tally.get("weights").items()}
