"""The edges of a circuit: what each of its heads does through each head of the stage before.

    edge (s, r) = effect of the path from s to the query, key or value of r alone, over the whole change

By path patching as in `discover`, with one receiver at a time, and only the heads that the circuit keeps.
Effects through one receiver need not add up to that through all of them together.

Source: Wang et al., 2023, arXiv 2211.00593, section 3.1. Status: partly our choice (one receiver at a time).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from regard.errors import RegardError
from regard.lens.circuits.discover import GENERAL, STAGES, Circuit, Stage, patch_stage
from regard.runtime.head_table import Head
from regard.tasks.prompts import Prompts

LOGITS = "logits"


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
    finder = _Finder(model, prompts, circuit, least, freeze_mlps, rows, progress)
    return [edge for stage in chosen for edge in finder.edges(stage)]


@dataclass(frozen=True)
class _Finder:
    model: nn.Module
    prompts: Prompts
    circuit: Circuit
    least: float
    freeze_mlps: bool
    rows: int
    progress: bool
    known: dict[str, list[Head]] = field(default_factory=dict)

    def edges(self, stage: Stage) -> list[Edge]:
        senders = self.circuit.heads(stage.name, least=self.least)
        self.known[stage.name] = senders
        if stage.of is None:
            found = [(head, self.circuit.effects.at(*head)[stage.name]) for head in senders]
            return [Edge(stage.name, head, None, None, effect) for head, effect in found]
        return [edge for head in self.known[stage.of] for edge in self._to(stage, head, senders)]

    def _to(self, stage: Stage, receiver: Head, senders: list[Head]) -> list[Edge]:
        layer = _layer(receiver)
        before = [head for head in senders if _layer(head) < layer]
        if not before:
            return []
        table = patch_stage(
            self.model, self.prompts, stage, [receiver], self.freeze_mlps, self.rows, self.progress, before
        )
        return [
            Edge(stage.name, head, receiver, stage.component, table.at(*head)["normalised"])
            for head in before
        ]


def _layer(head: Head) -> int:
    return int(head[0].rsplit(".", 1)[1])
