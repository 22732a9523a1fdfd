"""How large the residual stream is, block by block: does the first token tower above the rest?

    r_lj   = || residual stream after block l at position j ||_2
    peak_l = r_ls / max_{j != s} r_lj                 s the sink, by default the first real token

The residual-state peak of "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token
Phenomena in LLMs" (Guo et al., 2024, arXiv 2410.13835). Taken of what a block hands on, before any final
norm, where a peak vanishes. Norms in float32, as such values overflow float16.
Status: agrees with the official code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.errors import NothingObserved, RegardError
from regard.lens.base import Place, SequenceLens, accumulate, check_position
from regard.lens.registry import lens
from regard.lens.sentences import layer, size, token
from regard.lens.valid import tokens_before, valid_positions
from regard.lens.visible import per_forward
from regard.runtime.anatomy import Anatomy
from regard.runtime.findings import Finding
from regard.runtime.panels import LinePanel
from regard.runtime.run import Run
from regard.runtime.site import Point
from regard.runtime.table import Table
from regard.runtime.tally import Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEAK = 2.0
COLUMNS = ("first", "others", "largest_other", "largest_other_at", "peak")


@dataclass(frozen=True)
class Block:
    """A block as a tally knows it."""

    alias: str
    kind: str
    layer: int
    name: str


@dataclass(frozen=True)
class ResidualNorms:
    """Norms of the residual stream after each block, averaged over sequences.

    Attributes:
        table: one row a block: `block`, then `first`, the norm at the first real token, or at `position`;
            `others`, the mean of the others; `largest_other`, their maximum, and `largest_other_at`, the
            position where that was largest of all; `peak`, first over largest other. Where that token was
            in a cache before the session, `first` and `peak` are NaN.
        position: the token held against the others, counted from the first real one.
    """

    table: Table
    position: int = 0

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the norms over the blocks, on a logarithmic scale.

        Args:
            path: also write the picture there.

        Raises:
            RegardError: where matplotlib is not installed, or the path cannot be written.
        """
        try:
            from matplotlib import pyplot
        except ImportError as missing:
            raise RegardError('plot() needs matplotlib; run `pip install "regard[plot]"`.') from missing
        figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
        pyplot.close(figure)
        for name in ("first", "largest_other", "others"):
            axis.plot(self.table["block"], self.table[name], label=name.replace("_", " "))
        axis.set_yscale("log")
        axis.set_ylabel("norm of the residual stream")
        axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.legend(frameon=False)
        if path is not None:
            try:
                figure.savefig(path, dpi=150)
            except (OSError, ValueError) as failure:
                raise RegardError(f"cannot write {path}: {failure}.") from failure
        return figure

    def panels(self) -> tuple[LinePanel, ...]:
        """Return the norms as lines over the blocks."""
        lines = {name.replace("_", " "): self.table[name] for name in ("first", "largest_other", "others")}
        return (
            LinePanel(
                title="Residual stream", x=self.table["block"], lines=lines, x_label="after block",
                y_label="norm", log=True, note=f"at {token(self.position)}, and of the others",
            ),
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        self.table.to_json(path)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def __str__(self) -> str:
        return str(self.table)


@lens("residual-norm")
@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualNorm(SequenceLens):
    """Measure the norms of the residual stream; the result is a `ResidualNorms`.

    Attributes:
        kind: which stack of blocks, such as `vision`; default the model's main one.
        position: the token held against the others, counted from the first real one, 0.
    """

    definition = "norm of the residual stream after each block; peak: first token / largest other"
    source = "Guo et al. 2024, arXiv 2410.13835"
    needs = "no block of the model handed on hidden states [B, T, D]"

    kind: str | None = None
    position: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_position(self.position)

    def wants(self, call: Any) -> None:
        return None

    def points(self, anatomy: Anatomy) -> Iterable[Point]:
        """The end of every block that has attention, by the alias of its (first) site."""
        kind = self.kind or anatomy.main
        seen: set[int] = set()
        for site in anatomy.sites:
            if site.kind != kind:
                continue
            block = id(anatomy.block(site.alias))
            if block not in seen:
                seen.add(block)
                yield Point("residual", layer=site.alias)

    def hidden(self, point: Point, x: Tensor, run: Run) -> None:
        if x.ndim != 3:
            return
        alias = str(point.layer)
        kind, _, layer = alias.rpartition(".")
        state = self.state(run, Block(alias, kind, int(layer), alias))
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
        if "seen" not in state:
            state["seen"] = tokens_before(run, kind, len(norms)).to(x.device)
            state["largest"] = norms.new_full((len(norms),), -1.0)
            state["at"] = torch.zeros_like(state["seen"])
        tokens = _tokens(run, kind, state["seen"], norms, self.position)
        accumulate(state, "sums", torch.matmul(norms[:, None], tokens.shares)[:, 0])
        accumulate(state, "rows", tokens.rows)
        largest, index = norms.masked_fill(tokens.out, -1.0).max(1)
        place = tokens.positions.gather(1, index[:, None])[:, 0]
        state["at"] = torch.where(largest > state["largest"], place, state["at"])
        state["largest"] = torch.maximum(state["largest"], largest)
        accumulate(state, "seen", tokens.real)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "seen" not in state:
            return
        rows = state["rows"].cpu().double()
        some = rows[:, 1] > 0
        first, others = state["sums"].cpu().double()[some].unbind(1)
        begun, others_count = rows[some].unbind(1)
        largest = state["largest"].cpu().double()[some]
        count, began = float(some.sum()), float((begun > 0).sum())
        tally.mean(place, "first", first.sum(), began)
        tally.mean(place, "others", (others / others_count).sum(), count)
        tally.mean(place, "largest", largest.sum(), count)
        tally.mean(place, "peak", (first / largest).sum(), began)
        if count:
            best = int(largest.argmax())
            at = int(state["at"].cpu()[some][best])
            tally.append(place, "record", [float(largest[best]), at])

    def result(self) -> ResidualNorms:
        """Return the table.

        Raises:
            NothingObserved: where no block ran, or none on more than one token.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        found = {name: tally.get(name) for name in ("first", "others", "largest", "peak", "record")}
        aliases = sorted(found["first"], key=lambda a: (a.rpartition(".")[0], int(a.rpartition(".")[2])))
        if not aliases:
            raise NothingObserved(f"ResidualNorm has seen nothing: {self.needs}.")
        columns: dict[str, Any] = {"block": aliases}
        for name, key in zip(COLUMNS, ("first", "others", "largest", None, "peak"), strict=True):
            if key is not None:
                columns[name] = [float(found[key][a]) for a in aliases]
            else:
                columns[name] = [max(found["record"].get(a, [[0, -1]]))[1] for a in aliases]
        return ResidualNorms(Table(columns), self.position)

    @classmethod
    def findings(cls, result: ResidualNorms) -> tuple[Finding, ...]:
        """The block after which the first token's residual stream stands out most."""
        peaks = np.asarray(result.table["peak"])
        if not np.isfinite(peaks).any():
            return ()
        at = int(np.nanargmax(peaks))
        after = layer(result.table["block"][at])
        first, other = result.table["first"][at], result.table["largest_other"][at]
        it = token(result.position)
        said = f"The residual stream peaks at {it}: after {after} its norm is {size(first)}, the "
        said += f"largest other {size(other)}."
        if peaks[at] <= PEAK:
            said = f"No residual peak: {it}'s norm is at most {peaks[at]:.1f} times the largest "
            said += f"other, after {after}."
        return (Finding(said, (), "residual-norm"),)


@dataclass(frozen=True)
class _Tokens:
    """What the tokens of a forward are to every block of a stack; B sequences of T, counted once.

    Attributes:
        positions: int64 [B, T], real tokens counted from 0.
        shares: float32 [B, T, 2], 1 at the token held against the others, and 1 at these.
        out: bool [B, T], not one of the others.
        rows: their sums over T, float32 [B, 2].
        real: how many are real, int64 [B].
    """

    positions: Tensor
    shares: Tensor
    out: Tensor
    rows: Tensor
    real: Tensor


def _tokens(run: Run, kind: str, seen: Tensor, norms: Tensor, place: int) -> _Tokens:
    """Return what tokens with these norms [B, T] are, after `seen`, [B], others; `place` is the one apart."""
    store = per_forward(run)
    key = ("tokens", kind, place, tuple(norms.shape), norms.device, tuple(seen.tolist()))
    if key not in store:
        valid = valid_positions(run, kind, norms.shape[1])
        real = torch.ones_like(norms, dtype=torch.bool) if valid is None else valid.to(norms.device)
        positions = seen[:, None] + real.long().cumsum(1) - 1
        first, others = real & (positions == place), real & (positions != place)
        shares = torch.stack([first, others], -1).to(norms.dtype)
        store[key] = _Tokens(positions, shares, ~others, shares.sum(1), real.sum(1))
    return store[key]
