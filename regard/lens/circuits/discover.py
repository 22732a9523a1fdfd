"""A circuit found from its end: heads that act on the answer, then those that act on these, and so on.

    stage 1   senders whose path to the logits matters, at the last position
    stage n   senders whose path to the queries, keys or values of an earlier stage's heads matters
    kept      of each stage the share of all heads with the largest |effect|, 2 % by default

The share is of all heads, so a stage names some wherever any head comes before its receivers;
`Circuit.heads(stage, least=...)` leaves out those whose effect is small. Effects are over the whole change
from clean to corrupt: 1 is as much as the corrupt prompt does. How far two disjoint halves of the prompts
rank the heads alike comes with every circuit.

Sources: Wang et al., 2023, arXiv 2211.00593 (the stages of indirect objects); Merullo et al., 2024, arXiv
2310.08744 (2 % a stage, overlap of circuits). Status: partly our choice (the stages of other tasks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.head_statistics import Overlap, overlap
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.path_stages import Component
from regard.runtime.paths import PathEffects, halves_agree, path_patch
from regard.runtime.table import Table, finite
from regard.tasks.prompts import PromptPair, Prompts

SHARE = 0.02
SHARES = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Stage:
    """One step of the search.

    Attributes:
        name: a column of the result.
        place: where senders and receivers are, a place that the task names.
        of: the stage whose heads receive; None for the logits.
        component: which of their inputs.
    """

    name: str
    place: str = "END"
    of: str | None = None
    component: Component = "query"


GENERAL = (Stage("writers"), Stage("feeders", of="writers"))
STAGES: Mapping[str, tuple[Stage, ...]] = {
    "ioi": (
        Stage("movers"),
        Stage("inhibition", of="movers"),
        Stage("repetition", place="S2", of="inhibition", component="value"),
        Stage("previous", place="S1+1", of="repetition", component="key"),
    ),
    "colored_objects": (*GENERAL, Stage("gatherers", of="feeders", component="value")),
    "docstring": (*GENERAL, Stage("previous", place="B_doc", of="writers", component="key")),
}


@dataclass(frozen=True, eq=False)
class Circuit:
    """Heads by stage.

    Attributes:
        task: whose circuit.
        effects: one column a stage: the mean effect of each head over the whole change.
        share: of all heads that each stage keeps.
    """

    task: str
    effects: HeadTable
    share: float = SHARE

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, from the logits backwards."""
        return tuple(self.effects.columns)

    @property
    def stability(self) -> Mapping[str, float]:
        """Stage -> rank correlation of the heads' effects between two disjoint halves of the prompts.

        The receivers are those that all prompts together gave. NaN for a single prompt.
        """
        kept: Mapping[str, float | None] = self.effects.about.get("stability", {})
        return {name: math.nan if x is None else x for name, x in kept.items()}

    def heads(self, stage: str | None = None, *, least: float = 0.0) -> list[Head]:
        """Return the heads of a stage, the largest |effect| first, or of all stages together.

        Args:
            least: smallest |effect| that counts.
        """
        if stage is None:
            every = [head for name in self.stages for head in self.heads(name, least=least)]
            return list(dict.fromkeys(every))
        values = np.abs(self.effects[stage])
        count = _kept(len(values), self.share)
        order = np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable")[:count]
        return [self.effects.names[i] for i in order if values[i] >= least and not np.isnan(values[i])]

    def overlap(self, other: Circuit, *, share: float | None = None, least: float = 0.0) -> Overlap:
        """Compare the heads of two circuits of one model, beside what chance gives.

        Args:
            share: of all heads that each stage keeps, in both; default each its own.

        Raises:
            RegardError: where they are of different models.
        """
        if self.effects.names != other.effects.names:
            raise RegardError(
                f"the circuits are of models with {len(self.effects)} and {len(other.effects)} heads; only "
                "heads of one model can be compared."
            )
        first, second = (c if share is None else replace(c, share=share) for c in (self, other))
        return overlap(first.heads(least=least), second.heads(least=least), len(self.effects))

    def overlaps(self, other: Circuit, shares: Sequence[float] = SHARES) -> Table:
        """Compare two circuits of one model at several sizes, beside what chance gives.

        Args:
            shares: of all heads that each stage keeps.

        Returns:
            Columns `share`; `first` and `second`, heads of either; `shared`; `expected`, heads that random
            sets of these sizes share; `jaccard`, shared of the union, `chance`, the same of `expected`; and
            `p`, how often random sets share as many.
        """
        rows = []
        for share in shares:
            found = self.overlap(other, share=share)
            union = found.first + found.second - found.expected
            rows.append(
                {
                    "share": share, "first": found.first, "second": found.second, "shared": found.shared,
                    "expected": found.expected, "jaccard": found.jaccard, "chance": found.expected / union,
                    "p": found.p_value,
                }
            )  # fmt: skip
        return Table({name: [row[name] for row in rows] for name in rows[0]})

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        about = {**self.effects.about, "task": self.task, "share": self.share}
        replace(self.effects, about=about).save(path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            RegardError: where the file is missing or holds no circuit.
        """
        table = HeadTable.load(path)
        about = dict(table.about)
        if not {"task", "share"} <= set(about):
            raise RegardError(f"{path} holds a list of heads and no circuit.")
        task, share = about.pop("task"), about.pop("share")
        return cls(task, replace(table, about=about), share)


def discover_circuit(
    model: nn.Module,
    prompts: Prompts,
    stages: Sequence[Stage] | None = None,
    *,
    share: float = SHARE,
    freeze_mlps: bool = False,
    exact: bool = True,
    rows: int = 512,
    progress: bool = True,
    save: str | Path | None = None,
) -> Circuit:
    """Find the heads that act on the answer of a task, stage by stage, by path patching.

    Args:
        model: a causal language model in evaluation mode.
        prompts: of a task, such as `ioi(tokenizer, 32)`.
        stages: what to look for; default those known for the task, or writers and what acts on their queries.
        share: of all heads that each stage keeps, in (0, 1].
        freeze_mlps, exact, rows, progress: as in `path_patch`.
        save: a file that keeps what is finished, so that the search can be stopped and started again.

    Raises:
        RegardError: for stages that name none before them, or a share out of range.
        ShapeMismatch: for prompts whose two sides have different lengths.

    Example:
        >>> circuit = discover_circuit(model, ioi(tokenizer, 32))               # doctest: +SKIP
        >>> circuit.heads("inhibition")                                         # doctest: +SKIP
    """
    chosen = tuple(STAGES.get(prompts.task, GENERAL) if stages is None else stages)
    _check(chosen, share)
    prompts.require_aligned()
    found: dict[str, HeadTable] = {}
    receivers: dict[str, list[Head]] = {}
    for stage in chosen:
        to = None if stage.of is None else receivers[stage.of]
        if to == []:
            table = _nothing(found[chosen[0].name])
        else:
            table = patch_stage(
                model, prompts, stage, to, freeze_mlps, rows, progress, exact=exact, save=save
            )
        found[stage.name] = table
        receivers[stage.name] = Circuit(prompts.task, _column(table, stage.name), share).heads()
    first = found[chosen[0].name]
    columns = {name: table["normalised"] for name, table in found.items()}
    about = {
        **first.about, "prompts": len(prompts), "freeze_mlps": freeze_mlps or not exact,
        "stability": {name: table.about["stability"] for name, table in found.items()},
    }  # fmt: skip
    return Circuit(prompts.task, HeadTable(first.sites, first.heads, columns, about), share)


def _nothing(table: HeadTable) -> HeadTable:
    """The effects at a stage that has no receivers, for no head came before those of the stage before."""
    about = {**table.about, "stability": None}
    return replace(table, columns={name: np.full(len(table), np.nan) for name in table.columns}, about=about)


def _column(table: HeadTable, name: str) -> HeadTable:
    return HeadTable(table.sites, table.heads, {name: table["normalised"]}, table.about)


def patch_stage(
    model: nn.Module, prompts: Prompts, stage: Stage, receivers: Sequence[Head] | None, freeze_mlps: bool,
    rows: int, progress: bool, *, exact: bool = True,
    save: str | Path | None = None,
) -> HeadTable:  # fmt: skip
    """Patch all prompts, those of one length and place together, and join what was found.

    Args:
        receivers: of this stage; None for the logits.
        freeze_mlps, rows, progress, exact, save: as in `path_patch`.

    Returns:
        Columns `effect`, the mean change, and `normalised` by the whole change from clean to corrupt.
    """
    tokens = prompts.answers() if prompts.metric == "logit" else None
    parts = []
    for part, position in grouped(prompts, stage.place):
        parts.append(
            path_patch(
                model, {"input_ids": part.ids()}, {"input_ids": part.ids("corrupt")}, part.score,
                receivers=receivers, component=stage.component, position=position,
                freeze_mlps=freeze_mlps, rows=rows, progress=progress, exact=exact, tokens=tokens, save=save,
            )
        )  # fmt: skip
    return joined(parts)


def joined(parts: list[PathEffects]) -> HeadTable:
    """Return the effects of several parts of the prompts as those of all of them."""
    each = torch.cat([part.each for part in parts], 1).double()
    sizes = [part.each.shape[1] for part in parts]
    sides = [[part.clean for part in parts], [part.corrupt for part in parts]]
    clean, corrupt = (float(np.average(side, weights=sizes)) for side in sides)
    first, mean = parts[0].heads, each.mean(1)
    columns = {"effect": mean.numpy(), "normalised": (mean / (corrupt - clean)).numpy()}
    stability = finite(halves_agree(each))
    about = {"main": first.about["main"], "clean": clean, "corrupt": corrupt, "stability": stability}
    return HeadTable(first.sites, first.heads, columns, about)


def grouped(prompts: Prompts, place: str) -> list[tuple[Prompts, int]]:
    """Return the prompts parted by length and by the position of a place, with that position."""
    places: Tensor = prompts.places(place)
    parts: dict[tuple[int, int], list[PromptPair]] = {}
    for pair, position in zip(prompts.pairs, places.tolist(), strict=True):
        parts.setdefault((len(pair.clean_ids), position), []).append(pair)
    return [(replace(prompts, pairs=tuple(pairs)), position) for (_, position), pairs in parts.items()]


def _kept(heads: int, share: float) -> int:
    return max(1, math.ceil(share * heads - 1e-9))


def _check(stages: tuple[Stage, ...], share: float) -> None:
    if not 0 < share <= 1:
        raise RegardError(f"share is {share}; it must be above 0 and at most 1.")
    if not stages:
        raise RegardError("stages is empty; a circuit has one stage at least.")
    known: set[str] = set()
    for stage in stages:
        if stage.of is not None and stage.of not in known:
            raise RegardError(
                f"stage {stage.name!r} is of {stage.of!r}, which does not come before it; there are "
                f"{', '.join(sorted(known)) or 'none'}."
            )
        if stage.name in known:
            raise RegardError(f"two stages are called {stage.name!r}.")
        known.add(stage.name)
