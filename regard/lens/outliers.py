"""How far the largest activations stand out: infinity norm and kurtosis of what layers hand on.

    inf_s      = max |x|                              x [T, D], one sequence s of one tensor
    kurtosis_s = mean (x - mu)^4 / (std^4 + 1e-6)     std with T D - 1; a normal distribution has 3

over all positions and channels of a sequence, then averaged over sequences, for what each block, its
attention and its MLP hand on. Beside each stands the same with some positions left out, by default the first
token, on which most of it rests in models with an attention sink. It is no headline: a quantiser meets the
first token too.

Source: Bondarenko et al., 2023, arXiv 2306.12929, section 3 and appendix. Status: agrees with the official
code (Qualcomm-AI-research/outlier-free-transformers, `validate_clm.py`), which also looks at norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.errors import NothingObserved, RegardError
from regard.lens.base import Place, SequenceLens
from regard.lens.registry import lens
from regard.lens.sentences import layer, size
from regard.lens.valid import tokens_before, valid_positions
from regard.runtime.anatomy import Anatomy
from regard.runtime.findings import Finding
from regard.runtime.panels import LinePanel
from regard.runtime.run import Run
from regard.runtime.site import Point
from regard.runtime.table import Table
from regard.runtime.tally import Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TENSORS = {"residual": "block", "attention": "attention", "mlp": "MLP"}
COLUMNS = ("infinity", "kurtosis", "infinity_rest", "kurtosis_rest", "largest_at_first")
TINY, HIGH = 1e-6, 20.0


@dataclass(frozen=True)
class Handed:
    """What a part of a block hands on, as a tally knows it."""

    alias: str
    kind: str
    layer: int
    name: str


@dataclass(frozen=True)
class OutlierReport:
    """Outliers of every tensor looked at, averaged over sequences.

    Attributes:
        table: one row a tensor: `block`, `tensor` ("residual", "attention" or "mlp"), `infinity` and
            `kurtosis`; `infinity_rest` and `kurtosis_rest`, the same without the positions left out;
            `largest_at_first`, in what share of sequences the largest stands at the first token;
            `largest_channel`, the channel that holds it most often, and `largest_channel_share`, how often.
    """

    table: Table

    def worst(self, column: str = "infinity", tensor: str = "residual") -> float:
        """Return the maximum of a column over the tensors of one kind; over all where `tensor` is "".

        Raises:
            RegardError: where there is no such column or tensor.
        """
        if column not in COLUMNS or tensor not in ("", *TENSORS):
            raise RegardError(
                f"there is no {column!r} of {tensor!r}; columns are {', '.join(COLUMNS)}, and tensors "
                f"{', '.join(TENSORS)}."
            )
        rows = zip(self.table["tensor"], self.table[column], strict=True)
        return float(np.nanmax([value for kind, value in rows if tensor in ("", kind)]))

    def lines(self, column: str, tensor: str = "residual") -> tuple[list[str], list[float]]:
        """Return the blocks, and a column over them, of one kind of tensor."""
        rows = zip(self.table["block"], self.table["tensor"], self.table[column], strict=True)
        found = [(block, value) for block, kind, value in rows if kind == tensor]
        return [block for block, _ in found], [value for _, value in found]

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw both measures of the blocks, with and without the positions left out.

        Args:
            path: also write the picture there.

        Raises:
            RegardError: where matplotlib is not installed, or the path cannot be written.
        """
        try:
            from matplotlib import pyplot
        except ImportError as missing:
            raise RegardError('plot() needs matplotlib; run `pip install "regard[plot]"`.') from missing
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        pyplot.close(figure)
        for axis, name in zip(axes, ("infinity", "kurtosis"), strict=True):
            for column, label in ((name, "all positions"), (f"{name}_rest", "without those left out")):
                axis.plot(*self.lines(column), label=label)
            axis.set(yscale="log", title=name)
            axis.tick_params(axis="x", rotation=90, labelsize=7)
        axes[0].legend(frameon=False)
        if path is not None:
            try:
                figure.savefig(path, dpi=150)
            except (OSError, ValueError) as failure:
                raise RegardError(f"cannot write {path}: {failure}.") from failure
        return figure

    def panels(self) -> tuple[LinePanel, ...]:
        """Return both measures as lines over the blocks."""
        made = []
        for name, title in (("infinity", "Largest activation"), ("kurtosis", "Kurtosis of activations")):
            blocks, every = self.lines(name)
            lines = {"all positions": every, "without the first": self.lines(f"{name}_rest")[1]}
            made.append(
                LinePanel(
                    title=title, x=blocks, lines=lines, x_label="after block", y_label=name, log=True,
                    note="of what blocks hand on",
                )
            )  # fmt: skip
        return tuple(made)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        self.table.to_json(path)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def __str__(self) -> str:
        return str(self.table)


@lens("outliers")
@dataclass(frozen=True, kw_only=True, eq=False)
class Outliers(SequenceLens):
    """Measure outliers of activations; the result is an `OutlierReport`.

    Attributes:
        without: positions that `infinity_rest` and `kurtosis_rest` leave out, counted from the first real
            token.
        tensors: which to look at: "residual", what a block hands on; "attention" and "mlp", what these add to
            it. One that a model does not have is left out.
        kind: which stack of blocks, such as `vision`; default the model's main one.
    """

    definition = "largest |x| and kurtosis of activations, over positions and channels of a sequence"
    source = "Bondarenko et al. 2023, arXiv 2306.12929"
    needs = "no block of the model handed on hidden states [B, T, D]"

    without: Sequence[int] = (0,)
    tensors: Sequence[str] = tuple(TENSORS)
    kind: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "without", tuple(self.without))
        object.__setattr__(self, "tensors", tuple(self.tensors))
        if any(not isinstance(p, int) or isinstance(p, bool) or p < 0 for p in self.without):
            raise RegardError(f"without is {self.without}; positions count from 0.")
        unknown = [name for name in self.tensors if name not in TENSORS]
        if unknown or not self.tensors:
            raise RegardError(f"tensors is {self.tensors}; it takes some of {', '.join(TENSORS)}.")

    def wants(self, call: Any) -> None:
        return None

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        """What every block that has attention, its attention and its MLP hand on."""
        kind, seen = self.kind or anatomy.main, set()
        for site in anatomy.sites:
            for tensor in self.tensors if site.kind == kind else ():
                point = Point(tensor, layer=site.alias)
                try:
                    place = anatomy.place(point)
                except RegardError:
                    continue
                if (tensor, id(place[0])) not in seen:
                    seen.add((tensor, id(place[0])))
                    yield point

    def hidden(self, point: Point, x: Tensor, run: Run) -> None:
        if x.ndim != 3:
            return
        alias = str(point.layer)
        kind, _, number = alias.rpartition(".")
        place = Handed(f"{point.kind}:{alias}", kind, int(number), alias)
        state, valid = self.state(run, place), valid_positions(run, kind, x.shape[1])
        if "seen" not in state:
            state["seen"] = tokens_before(run, kind, len(x)).to(x.device)
            for name in ("some", "rest"):
                state[name] = x.new_zeros(len(x), 5, dtype=torch.float64)
                state[f"{name}_largest"] = x.new_zeros(len(x), dtype=torch.float64)
            state["at"], state["channel"] = (torch.full_like(state["seen"], -1) for _ in range(2))
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if valid is None else valid.to(x.device)
        real = real.expand(len(x), -1)
        positions = state["seen"][:, None] + real.long().cumsum(1) - 1
        out = torch.zeros_like(real)
        for position in self.without:
            out |= positions == position
        _add(state, "some", x, real & out)
        _add(state, "rest", x, real & ~out)
        _note_largest(state, x, real, positions)
        state["seen"] = state["seen"] + real.sum(1)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "seen" not in state:
            return
        some, rest = state["some"].cpu(), state["rest"].cpu()
        largest = {name: state[f"{name}_largest"].cpu() for name in ("some", "rest")}
        found = {
            "infinity": (torch.maximum(largest["some"], largest["rest"]), some[:, 0] + rest[:, 0]),
            "kurtosis": (_kurtosis(some + rest), some[:, 0] + rest[:, 0]),
            "infinity_rest": (largest["rest"], rest[:, 0]),
            "kurtosis_rest": (_kurtosis(rest), rest[:, 0]),
            "largest_at_first": ((state["at"].cpu() == 0).double(), some[:, 0] + rest[:, 0]),
        }
        for name, (values, numbers) in found.items():
            there = numbers > 1
            tally.mean(place, name, values[there].sum(), float(there.sum()))
        for channel in state["channel"].cpu().tolist():
            tally.append(place, "channel", int(channel))

    def result(self) -> OutlierReport:
        """Return the report.

        Raises:
            NothingObserved: where no block ran.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        channels = tally.get("channel")
        if not channels:
            raise NothingObserved(f"Outliers has seen nothing: {self.needs}.")
        order = {name: i for i, name in enumerate(TENSORS)}
        keys = sorted(
            channels,
            key=lambda a: (order[a.partition(":")[0]], a.rpartition(".")[0], int(a.rpartition(".")[2])),
        )
        columns: dict[str, Any] = {
            "block": [key.partition(":")[2] for key in keys],
            "tensor": [key.partition(":")[0] for key in keys],
        }
        for name in COLUMNS:
            values = tally.get(name)
            columns[name] = [float(values[key]) for key in keys]
        most = [max(sorted(set(channels[key])), key=channels[key].count) for key in keys]
        columns["largest_channel"] = most
        columns["largest_channel_share"] = [
            channels[key].count(channel) / len(channels[key]) for key, channel in zip(keys, most, strict=True)
        ]
        return OutlierReport(Table(columns))

    @classmethod
    def findings(cls, result: OutlierReport) -> tuple[Finding, ...]:
        """The block whose output has the highest kurtosis, and what is left of it without the first token."""
        blocks, kurtosis = result.lines("kurtosis")
        if not np.isfinite(kurtosis).any():
            return ()
        at = int(np.nanargmax(kurtosis))
        here = {name: result.lines(name)[1][at] for name in COLUMNS}
        said = (
            f"After {layer(blocks[at])} the largest activation is {size(here['infinity'])} and the kurtosis "
        )
        said += f"{size(here['kurtosis'])}; without the first token {size(here['infinity_rest'])} and "
        said += f"{size(here['kurtosis_rest'])}."
        if kurtosis[at] < HIGH:
            said = f"No outliers: the kurtosis of what blocks hand on is at most {size(kurtosis[at])}, and "
            said += "3 in a normal distribution."
        return (Finding(said, (), "outliers"),)


def _add(state: dict[str, Any], name: str, x: Tensor, chosen: Tensor) -> None:
    """Add count and first four powers of the chosen positions to a sequence's sums, and their largest."""
    if not bool(chosen.any()):
        return
    kept = x.double() * chosen[..., None]
    square = kept * kept
    sums = (chosen.sum(1) * x.shape[2], *(p.sum((1, 2)) for p in (kept, square, square * kept, square**2)))
    state[name] = state[name] + torch.stack([s.double() for s in sums], 1)
    state[f"{name}_largest"] = torch.maximum(state[f"{name}_largest"], kept.abs().amax((1, 2)))


def _note_largest(state: dict[str, Any], x: Tensor, real: Tensor, positions: Tensor) -> None:
    """Keep the position and the channel of each sequence's largest number."""
    sizes = x.double().abs().masked_fill(~real[..., None], -1.0).flatten(1)
    largest, index = sizes.max(1)
    before = state.get("largest", torch.full_like(largest, -1.0))
    better = largest > before
    place = positions.gather(1, (index // x.shape[2])[:, None])[:, 0]
    state["at"] = torch.where(better, place, state["at"])
    state["channel"] = torch.where(better, index % x.shape[2], state["channel"])
    state["largest"] = torch.maximum(before, largest)


def _kurtosis(sums: Tensor) -> Tensor:
    """Return the kurtosis of each sequence [B] from its count and power sums [B, 5]."""
    n, s1, s2, s3, s4 = sums.unbind(1)
    n = n.clamp_min(2)
    mean = s1 / n
    fourth = (s4 - 4 * mean * s3 + 6 * mean**2 * s2 - 3 * n * mean**4) / n
    variance = (s2 - s1 * mean) / (n - 1)
    return fourth / (variance**2 + TINY)
