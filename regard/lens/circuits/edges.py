"""The edges of a circuit: what each of its heads does through each head of the stage before.

    edge (s, r) = effect of the path from s to the query, key or value of r alone, over the whole change

By path patching as in `discover`, with one receiver at a time, and only the heads that the circuit keeps.
Effects through one receiver need not add up to that through all of them together.

Source: Wang et al., 2023, arXiv 2211.00593, section 3.1. Status: partly our choice (one receiver at a time).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from regard.errors import RegardError
from regard.lens.circuits.discover import GENERAL, STAGES, Circuit, Stage, grouped, joined
from regard.runtime.anatomy import root_of
from regard.runtime.head_table import Head, split
from regard.runtime.path_stages import Received
from regard.runtime.paths import PathEffects, PathRuns
from regard.runtime.progress import bar
from regard.tasks.prompts import Prompts


@dataclass(frozen=True)
class Edge:
    """A path between two heads of a circuit, or from one to the logits.

    Attributes:
        stage: of the sender.
        sender: (alias, head).
        receiver: (alias, head), or None for the logits.
        component: which of the receiver's inputs; None for the logits.
        effect: over the whole change from clean to corrupt.
    """

    stage: str
    sender: Head
    receiver: Head | None
    component: str | None
    effect: float


def circuit_edges(
    model: nn.Module,
    prompts: Prompts,
    circuit: Circuit,
    stages: Sequence[Stage] | None = None,
    *,
    least: float = 0.0,
    freeze_mlps: bool = False,
    rows: int = 512,
    progress: bool = True,
) -> list[Edge]:
    """Measure the edges between the heads that a circuit keeps.

    Args:
        model, prompts: those the circuit was found with; other prompts of the task do as well.
        circuit: from `discover_circuit`.
        stages: those it was found by; default those known for its task.
        least: smallest |effect| of a head that counts.
        freeze_mlps, rows, progress: as in `path_patch`.

    Returns:
        Edges by stage; those to a head that does not come after the sender are left out.

    Raises:
        RegardError: where the stages are not those of the circuit.

    Example:
        >>> edges = circuit_edges(model, prompts, circuit)                      # doctest: +SKIP
        >>> max(edges, key=lambda edge: abs(edge.effect)).sender                # doctest: +SKIP
    """
    chosen = tuple(STAGES.get(circuit.task, GENERAL) if stages is None else stages)
    if tuple(stage.name for stage in chosen) != circuit.stages:
        raise RegardError(
            f"the circuit has the stages {', '.join(circuit.stages)}, and "
            f"{', '.join(s.name for s in chosen)} were given."
        )
    prompts.require_aligned()
    finder = _Finder(model, prompts, circuit, least, freeze_mlps, rows)
    found = []
    between = sum(stage.of is not None for stage in chosen)
    with bar("Measuring edges", between * len(prompts), progress) as advance:
        for stage in chosen:
            found += _to_logits(circuit, stage, least) if stage.of is None else finder.edges(stage, advance)
    return found


def _to_logits(circuit: Circuit, stage: Stage, least: float) -> list[Edge]:
    heads = circuit.heads(stage.name, least=least)
    return [Edge(stage.name, head, None, None, circuit.effects.at(*head)[stage.name]) for head in heads]


@dataclass(frozen=True)
class _Finder:
    """Runs each part of the prompts once for all receivers of a stage."""

    model: nn.Module
    prompts: Prompts
    circuit: Circuit
    least: float
    freeze_mlps: bool
    rows: int

    def edges(self, stage: Stage, advance: Callable[[int], None]) -> list[Edge]:
        assert stage.of is not None
        senders = self.circuit.heads(stage.name, least=self.least)
        before = {
            receiver: [head for head in senders if split(head[0])[1] < split(receiver[0])[1]]
            for receiver in self.circuit.heads(stage.of, least=self.least)
        }
        parts: dict[Head, list[PathEffects]] = {receiver: [] for receiver, some in before.items() if some}
        for part, position in grouped(self.prompts, stage.place):
            runs = PathRuns.of(
                root_of(self.model), [part.ids(), part.ids("corrupt")], part.score, position,
                self.freeze_mlps, False, self.rows,
            )  # fmt: skip
            for receiver in parts:
                received = Received({receiver[0]: [receiver[1]]}, stage.component)
                parts[receiver].append(runs.effects(received, list(before[receiver]), progress=False))
            advance(len(part))
        tables = {receiver: joined(found) for receiver, found in parts.items()}
        return [
            Edge(stage.name, head, receiver, stage.component, table.at(*head)["normalised"])
            for receiver, table in tables.items()
            for head in before[receiver]
        ]
