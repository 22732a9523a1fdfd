"""How much attention each key receives, by position.

    alpha_k = sum_i A_ik / #{rows i able to see k}

the column sum over the number of rows that can see the key, as in "Active-Dormant Attention Heads:
Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo et al., 2024, arXiv 2410.13835), which
divides by N - j. Sequences are pooled: sums and counts are added position by position.
A text longer than `bins` is told in bins of 2, 4, 8 ... positions; sums and counts add up, so that this
is the exact mean over the bin. A sink logit's share is not counted. Status: agrees with the official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NoSuchSite, RegardError
from regard.lens.base import Place, SequenceLens, head_table
from regard.lens.columns import add_columns, aligned, note_columns
from regard.lens.registry import lens
from regard.runtime.call import Call
from regard.runtime.head_table import HeadTable
from regard.runtime.panels import LinePanel, MapPanel
from regard.runtime.table import Table
from regard.runtime.tally import Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 2**20


@dataclass(frozen=True, eq=False)
class ColumnMassResult:
    """Mean attention received, by position.

    Attributes:
        heads: `first`, the mass of the first bin; `largest`, that of the heaviest other bin, and
            `largest_at`, the position where that begins.
        mass: alias -> float64 [H, bins]; NaN where no row saw a key.
        widths: alias -> positions in a bin; bin b begins at position b * width.
    """

    heads: HeadTable
    mass: Mapping[str, npt.NDArray[np.float64]]
    widths: Mapping[str, int]

    @property
    def table(self) -> Table:
        """One row a head."""
        return self.heads.table

    def of(self, site: str, head: int) -> npt.NDArray[np.float64]:
        """Return the mass of one head by bin, float64 [bins].

        Raises:
            NoSuchSite: where it was not observed.
        """
        if site not in self.mass or not 0 <= head < len(self.mass[site]):
            raise NoSuchSite(f"head {head} of {site} was not observed; sites are {', '.join(self.mass)}.")
        return self.mass[site][head]

    def plot(self, column: str | None = None, path: str | Path | None = None) -> Figure:
        """Draw a column of `heads` as a heat map; see `HeadTable.plot`."""
        return self.heads.plot(column, path)

    def panels(self) -> tuple[MapPanel | LinePanel, ...]:
        """Return the map of heads, and a line over positions for each width of bins."""
        lines = []
        for width in sorted(set(self.widths.values())):
            sites = [self.mass[a] for a in self.mass if self.widths[a] == width]
            bins = max(x.shape[1] for x in sites)
            heads = np.concatenate(
                [np.pad(x, ((0, 0), (0, bins - x.shape[1])), constant_values=np.nan) for x in sites]
            )
            seen = np.isfinite(heads).any(0)
            heads = np.where(seen, heads, 0.0)
            mean, most = (np.where(seen, f(heads, 0), np.nan) for f in (np.nanmean, np.nanmax))
            lines.append(
                LinePanel(
                    title="Attention received, by position", x=[b * width for b in range(bins)],
                    lines={"largest of all heads": most.tolist(), "mean over heads": mean.tolist()},
                    x_label="position" + (f", in bins of {width}" if width > 1 else ""),
                    y_label="attention received", log=True,
                    note=f"{ColumnMass.definition} ({ColumnMass.source})",
                )
            )  # fmt: skip
        return (*self.heads.panels(), *lines)

    def save(self, path: str | Path) -> None:
        """Write `heads` as JSON; see `HeadTable.save`."""
        self.heads.save(path)

    def _repr_html_(self) -> str:
        return self.heads._repr_html_()

    def __str__(self) -> str:
        return str(self.heads)


@lens("column-mass")
@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnMass(SequenceLens):
    """Measure the mean attention that every position receives; the result is a `ColumnMassResult`.

    Attributes:
        bins: at most so many numbers a head; texts up to this length are told exactly.
    """

    definition = "mean attention a key receives from the rows able to see it"
    source = "Guo et al. 2024, arXiv 2410.13835"
    needs = "no attention was opened"

    bins: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 2:
            raise RegardError(f"bins is {self.bins}, and must be at least 2.")

    def weights(self, block: RowBlock) -> None:
        note_columns(self.state(block.run, block.site, block.call.part), block, None)

    def end_call(self, call: Call) -> None:
        add_columns(self.state(call.run, call.site, call.part), call)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "mass" not in state:
            return
        pad = state["pad"].cpu()
        mass = aligned(state["mass"].cpu(), pad).sum(0, dtype=torch.float64)
        rows = aligned(state["rows"].cpu(), pad).sum(0, dtype=torch.float64)
        used = int(rows.nonzero().max()) + 1 if bool(rows.any()) else 1
        width = 1
        while width * self.bins < used:
            width *= 2
        mass, rows = mass[:, :used], rows[:used]
        tally.mean(place, f"mass@{width}", _pool(mass, width, self.bins), 1.0)
        tally.mean(place, f"rows@{width}", _pool(rows, width, self.bins), 1.0)

    def result(self) -> ColumnMassResult:
        """Return the mass of all sites seen.

        Raises:
            NothingObserved: where no attention was opened.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        mass, widths, values = {}, {}, {}
        for alias in tally.aliases:
            found, widths[alias] = _together(tally, alias, self.bins)
            mass[alias] = found.numpy()
            rest = found[:, 1:].nan_to_num(-1.0) if found.shape[1] > 1 else torch.full_like(found, torch.nan)
            best = rest.max(-1)
            values[alias] = {
                "first": found[:, 0],
                "largest": best.values,
                "largest_at": (best.indices + 1) * widths[alias],
            }
        about = {
            "widths": widths,
        }
        return ColumnMassResult(head_table(HeadTable, self, values, about), mass, widths)


def _pool(x: Tensor, width: int, bins: int) -> Tensor:
    """Sum [..., P] over bins of `width`, [..., bins], zeros at the end."""
    padded = torch.nn.functional.pad(x, (0, width * bins - x.shape[-1]))
    return padded.unflatten(-1, (bins, width)).sum(-1)


def _together(tally: Tally, alias: str, bins: int) -> tuple[Tensor, int]:
    """Return all texts of a site pooled to the widest bins that any needs, [H, used bins], and the width."""
    mass: dict[int, Tensor] = {}
    rows: dict[int, Tensor] = {}
    width = 1
    while width <= WIDEST:
        for found, name in ((mass, f"mass@{width}"), (rows, f"rows@{width}")):
            if alias in tally.count(name):
                found[width] = tally.get(name)[alias] * tally.count(name)[alias]
        width *= 2
    width = max(mass)
    total = torch.stack([_pool(x, width // w, bins) for w, x in mass.items()]).sum(0)
    count = torch.stack([_pool(x, width // w, bins) for w, x in rows.items()]).sum(0)
    used = int(count.nonzero().max()) + 1
    return total[:, :used] / count[:used], width
