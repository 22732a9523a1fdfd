"""The three extremes of one domain of text: sinks, drained values and residual peaks, head by head.

    mass_j = sum_{i >= j} A_ij / (N - j)         for the sink; the heaviest two keys, by position
    first  = mean_{i > s} A_is                   without the sink's own row
    drain  = n_s / mean_{j != s} n_j             n the norm of a value after the output projection
    delta  = S_is - mean_{j != s} S_ij           the sink logit, its deviation, and that of other scores
    peak_l = r_ls / max_{j != s} r_lj            r the norm of the residual stream after block l

By the lenses `Sinks`, `ColumnMass`, `ValueNorm`, `SinkLogit` and `ResidualNorm`, whose files define them;
here they look at one sink, read the same texts, and stand in one table.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo et
al., 2024, arXiv 2410.13835). Status: agrees with the official code (the quantities); texts in pieces of 64
tokens, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from regard.errors import RegardError
from regard.lens.extremes.pieces import LENGTH, Pieces, Sink, Texts, Tick, cut, find_sinks, forward, watched
from regard.lens.registry import find_lens
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.panels import LinePanel, MapPanel
from regard.runtime.progress import bar
from regard.runtime.protocol import Lens

if TYPE_CHECKING:
    from regard.lens.column_mass import ColumnMassResult
    from regard.lens.residual_norm import ResidualNorms

RATE = 0.3


@dataclass(frozen=True, eq=False)
class Extremes:
    """Sinks, drains and peaks of a model on some texts.

    Attributes:
        heads: one row a head. `mass`, the mean attention that the sink receives from the rows able to see
            it, and `first`, the same without its own row; `rate_0.3`, in what share of pieces `mass` is above
            the threshold; `reach`, the share of later rows that can see it; `other`, the mass of the heaviest
            other key; `top_1` and `top_2`, the positions of the two heaviest keys, all pieces pooled; `drain`
            and `value`, the sink's value against the others', and its norm; `delta`, `spread` and `plain`,
            the sink logit, its deviation and that of other scores.
        residual: the norms of the residual stream after each block.
        windowed: aliases of sites where a sliding window hides the sink from some rows, which are left out.
        absent: blocks, or modules, that have no attention or none that can be reached; they have no rows.
        sinks: the position of every piece's sink.
        pieces: how many pieces were read.
    """

    heads: HeadTable
    residual: ResidualNorms
    windowed: tuple[str, ...]
    absent: tuple[str, ...]
    sinks: tuple[int, ...]
    findings: tuple[Finding, ...]

    @property
    def pieces(self) -> int:
        return len(self.sinks)

    def sink_rate(self, threshold: float = RATE) -> float:
        """Return the share of heads whose mean attention on the sink is above a threshold; its own row apart.

        Heads behind a sliding window, of whose rows some cannot see the sink, are left out.
        """
        first = self.heads["first"][self.heads["reach"] >= 1]
        return float((first > threshold).mean()) if len(first) else float("nan")

    def panels(self) -> tuple[MapPanel | LinePanel, ...]:
        """Return the map of heads, and the residual stream as lines."""
        return (*self.heads.panels(), *self.residual.panels())

    def plot(self, column: str = "first", path: str | Path | None = None) -> Any:
        """Draw a column of `heads` as a heat map; see `HeadTable.plot`."""
        return self.heads.plot(column, path)

    def save(self, path: str | Path) -> None:
        """Write `heads` as JSON; see `HeadTable.save`."""
        self.heads.save(path)

    def _repr_html_(self) -> str:
        return self.heads._repr_html_() + self.residual._repr_html_()

    def __str__(self) -> str:
        said = [finding.text for finding in self.findings]
        if self.windowed:
            said.append(f"A window hides the sink from some rows, left out, in {', '.join(self.windowed)}.")
        if self.absent:
            said.append(f"Without attention that can be read: {', '.join(self.absent)}.")
        return "\n".join(said)


def measure_sinks(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    sink: Sink = "first",
    threshold: float = RATE,
    length: int | None = LENGTH,
    most: int | None = None,
    progress: bool = True,
) -> Extremes:
    """Measure sinks, value drains, residual peaks and sink logits on texts.

    Args:
        model: a causal language model of transformers, or one that is called as they are.
        tokenizer: of the model; None where texts are token ids.
        texts: strings, or token ids int64 [T].
        sink: which token: `first`; `bos`, the first BOS token; `argmax`, of each piece the one that receives
            the most attention in total, which reads everything twice; or a position.
        threshold: of the column `rate_...`.
        length: tokens in a piece, see `regard.lens.extremes.pieces.cut`.
        most: at most so many pieces.
        progress: whether a bar is shown, where stderr is a terminal.

    Raises:
        RegardError: for texts of fewer than 2 tokens, a sink outside them, or a threshold out of range.
        UnsupportedModel: where no attention of the model can be reached.

    Example:
        >>> found = measure_sinks(model, tokenizer, [text])             # doctest: +SKIP
        >>> found.heads.top("first", 3), found.residual.table["peak"]   # doctest: +SKIP
    """
    model = root_of(model)
    require_attention(anatomy_of(model))
    make("sinks", eps=threshold)
    found = cut(texts, tokenizer, length, most)
    check_fits(model, found)
    with bar("Measuring", len(found) * (1 + (sink == "argmax")), progress) as tick:
        return read(model, find_sinks(model, found, sink, tick), tick, threshold)


def read(model: nn.Module, pieces: Pieces, tick: Tick, threshold: float = RATE) -> Extremes:
    """Return the extremes of pieces whose sinks are known."""
    lenses = merged(model, pieces, tick, lambda place: _lenses(place, threshold))
    sinks, mass, value, logit, norms = (lens.result() for lens in lenses)
    heads = _together(sinks, mass, value, logit, f"rate_{threshold:g}")
    told = [
        finding
        for lens, result in zip(lenses, (sinks, mass, value, logit, norms), strict=True)
        for finding in type(lens).findings(result)
    ]
    return Extremes(heads, norms, tuple(sinks.windowed), absent(model), pieces.sinks, tuple(told))


def _lenses(place: int, threshold: float) -> tuple[Lens, ...]:
    """Return the lenses, looking at one position of the sink."""
    at_place = (make(name, position=place) for name in ("value-norm", "sink-logit", "residual-norm"))
    return make("sinks", eps=threshold, position=place), make("column-mass"), *at_place


def make(name: str, /, **options: Any) -> Lens:
    """Return a lens by its name: a system imports no other."""
    return find_lens(name)(**options)


def merged(
    model: nn.Module, pieces: Pieces, tick: Tick, make: Callable[[int], Sequence[Lens]]
) -> tuple[Lens, ...]:
    """Return lenses that have seen all pieces.

    Args:
        make: returns the lenses for one position of the sink; what they saw is merged over positions.
    """
    found: tuple[Lens, ...] = ()
    for place, ids in pieces.batches():
        with watched(model, *make(place)) as seen:
            forward(model, ids, tick)
        fresh = tuple(seen.lenses.values())
        for kept, new in zip(found, fresh, strict=False):
            kept.merge(new)
        found = found or fresh
    return found


def check_fits(model: nn.Module, pieces: Sequence[Any]) -> None:
    """Refuse pieces longer than the model takes.

    Raises:
        RegardError: saying how many tokens that is.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    most = getattr(config, "max_position_embeddings", None)
    longest = max(len(ids) for ids in pieces)
    if isinstance(most, int) and longest > most:
        raise RegardError(f"a piece has {longest} tokens, and the model takes {most}; give a smaller length.")


def absent(model: nn.Module) -> tuple[str, ...]:
    """Return names of blocks that have no attention, and of attention that cannot be reached."""
    anatomy = anatomy_of(model)
    having = {name for name, _ in anatomy.blocks()}
    lists = {name.rpartition(".")[0] for name in having}
    beside = [
        f"{parent}.{number}"
        for parent in sorted(lists)
        if isinstance(stack := model.get_submodule(parent), nn.ModuleList)
        for number in range(len(stack))
    ]
    silent = [name for name in beside if name not in having]
    beyond = [name for name, _ in anatomy.unreachable if not any(name.startswith(f"{b}.") for b in silent)]
    return (*silent, *beyond)


def _together(
    sinks: HeadTable, mass: ColumnMassResult, value: HeadTable, logit: HeadTable, rate: str
) -> HeadTable:
    """Return one table of all columns, over the heads that `sinks` has."""
    rows = {name: row for row, name in enumerate(sinks.names)}

    def column(table: HeadTable, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        out = np.full(len(rows), np.nan)
        for found, number in zip(table.names, table[name], strict=True):
            if found in rows:
                out[rows[found]] = number
        return out

    place = sinks.about["position"]
    ranked = np.array([_heaviest(mass, *name) for name in sinks.names])
    columns = {
        "mass": sinks["alpha"], "first": sinks["first"], rate: sinks[rate], "reach": sinks["reach"],
        "other": np.array([_other(mass, *name, place) for name in sinks.names]),
        "top_1": ranked[:, 0], "top_2": ranked[:, 1],
        "drain": column(value, "drain"), "value": column(value, "first"),
        **{name: column(logit, name) for name in ("delta", "spread", "plain")},
    }  # fmt: skip
    about = {k: v for k, v in sinks.about.items() if k in ("main", "bos", "sequences")}
    about |= {
        "lens": "extremes",
        "definition": "sinks, value drains and sink logits",
        "source": sinks.about["source"],
    }
    return HeadTable(sinks.sites, sinks.heads, columns, about)


def _heaviest(mass: ColumnMassResult, site: str, head: int) -> list[float]:
    """Return the positions of the two heaviest keys of a head; a bin by where it begins."""
    found = np.nan_to_num(mass.of(site, head), nan=-1.0)
    order = np.argsort(-found, kind="stable")[:2] * float(mass.widths[site])
    return [*order.tolist(), np.nan][:2]


def _other(mass: ColumnMassResult, site: str, head: int, place: int) -> float:
    rest = mass.of(site, head).copy()
    at = place // mass.widths[site]
    if at < len(rest):
        rest[at] = np.nan
    return float(np.nanmax(rest)) if np.isfinite(rest).any() else float("nan")
