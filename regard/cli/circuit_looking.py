"""`regard inspect --lens circuits --task ioi`: find a task's circuit, say what its heads do, draw it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regard import __version__
from regard.cli import circuit_shown, fit, given
from regard.cli.command import say
from regard.cli.looking import RECORDER, Look
from regard.errors import RegardError, UnsupportedModel
from regard.lens.circuits import Circuit, Edge, circuit_edges, discover_circuit, label_heads, roles_of
from regard.lens.circuits.panels import LEAST, circuit_findings, circuit_panels, patched_panels
from regard.report import Recorder, Report, Section
from regard.runtime.activations import KINDS, ActivationEffects, activation_patch
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.table import Table, finite, write_text
from regard.tasks.paired import PAIRED, paired_task
from regard.tasks.prompts import PromptPair, Prompts
from regard.weights import Source
from regard.weights.quiet import busy

PROMPTS, MOST = 16, 512
METRICS = {
    "logit": "the right answer's logit above the wrong one's is",
    "probability": "the right answers' probability above the wrong ones' is",
}
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of one task.

    Attributes:
        circuit: the heads, stage by stage.
        labels: where each head looks and what it writes; of `ioi`, else None.
        roles: role -> heads; empty without labels.
        edges: between the heads of the circuit.
        shown: the prompt whose answer changes most, of the largest part of one length.
        patched: activations of that prompt, by layer and token.
    """

    prompts: Prompts
    circuit: Circuit
    labels: HeadTable | None
    roles: dict[str, list[Head]]
    edges: list[Edge]
    shown: PromptPair
    patched: ActivationEffects

    @property
    def said(self) -> str:
        """The prompts in words, and what the model makes of them."""
        about = self.circuit.effects.about
        change = f"{about['clean']:.2f} on the clean and {about['corrupt']:.2f} on the corrupt ones"
        return f"{self.prompts.said()} of {self.prompts.task}: {METRICS[self.prompts.metric]} {change}"


def run(options: argparse.Namespace) -> int:
    """Find a circuit; print it, and write it where that is asked for."""
    task = paired_task(_task(options.task))
    count = _number("prompts", options.prompts, PROMPTS, 2, MOST)
    seed = _number("seed", options.seed, 0, 0, 2**31)
    json_path, csv_path = given.check_outputs(options.json, options.csv)
    report = given.check_report(options.report, options.no_report, (json_path, csv_path))
    source = Source.find(options.model)
    with busy(f"Preparing {source.name}"):
        fit.check_reads_text(source)
        if not source.skeleton().can_generate():
            raise UnsupportedModel(
                f"{source.name} does not predict the next token, so it has no answer to explain."
            )
        prompts = task(source.tokenizer, count, seed=seed)
        prompts.require_aligned()
    first = prompts.pairs[0].clean
    look = Look.of(options.model, first, "a prompt", None, options.dtype, options.device)
    found = find(look, prompts)
    if report is not None:
        with busy(f"Writing {report}"):
            write_report(report, look, found)
    if json_path is not None:
        _write(json_path, as_json(look, found))
    if csv_path is not None:
        _write(csv_path, as_csv(found))
    if given.STANDARD not in (json_path, csv_path):
        circuit_shown.print_circuit(look, found, report)
    return 0


def find(look: Look, prompts: Prompts) -> Found:
    """Find the circuit of a task in a model."""
    circuit = discover_circuit(look.model, prompts)
    edges = circuit_edges(look.model, prompts, circuit, least=LEAST)
    labels = label_heads(look.model, prompts) if prompts.task == "ioi" else None
    roles = {} if labels is None else roles_of(labels)
    shown = _telling(look, prompts)
    clean, corrupt = ({"input_ids": ids[None]} for ids in (shown.clean_ids, shown.corrupt_ids))
    alone = dataclasses.replace(prompts, pairs=(shown,))
    patched = activation_patch(look.model, clean, corrupt, alone.score, kinds=KINDS)
    return Found(prompts, circuit, labels, roles, edges, shown, patched)


def _telling(look: Look, prompts: Prompts) -> PromptPair:
    """The prompt whose metric the corrupt side changes most, of the largest part of one length."""
    part = prompts.by_length()[0]
    with torch.no_grad():
        scores = [
            part.score(look.model(input_ids=part.ids(side), use_cache=False).logits[:, -1])
            for side in ("clean", "corrupt")
        ]
    return part.pairs[int((scores[0] - scores[1]).abs().argmax())]


def write_report(path: Path, look: Look, found: Found) -> None:
    """Write the page: what was found, the maps of heads, the graph, and the patterns on one prompt."""
    look = dataclasses.replace(look, ids=found.shown.clean_ids[None])
    seen = look.at_text({RECORDER: Recorder(name=RECORDER)}, None, True)
    title = f"On {found.said}"
    panels = circuit_panels(found.circuit, found.labels, found.edges, roles=found.roles)
    words = [look.tokenizer.decode([token]) for token in found.shown.clean_ids.tolist()]
    section = Section(
        title=title, short=found.prompts.task, findings=circuit_findings(found.circuit, found.roles),
        panels=[*panels, *patched_panels(found.patched, words)], recorded=seen[RECORDER],
    )  # fmt: skip
    facts = [look.size, title.removeprefix("On "), f"patterns and patched tokens: {found.shown.clean!r}"]
    Report(title=look.name, facts=facts, sections=[section], tokens=look.tokenizer).save(path)


def as_json(look: Look, found: Found) -> str:
    """Return every number; docs/look.md tells the keys."""
    circuit = found.circuit
    columns = _columns(found)
    document = {
        "format": FORMAT,
        "regard": __version__,
        "model": {"name": look.name, "class": type(look.model).__name__, "layers": look.layers},
        "task": {
            "name": circuit.task,
            "prompts": len(found.prompts),
            "left_out": list(found.prompts.left_out),
        },
        "about": circuit.effects.about,
        "circuit": {stage: circuit.heads(stage) for stage in circuit.stages},
        "roles": found.roles,
        "edges": [dataclasses.asdict(edge) for edge in found.edges],
        "patched": {
            "prompt": found.shown.clean,
            "corrupt": found.shown.corrupt,
            "direction": found.patched.direction,
            "layers": {kind: values.tolist() for kind, values in found.patched.layers.items()},
        },
        "heads": [
            {"site": site, "head": head, **{name: finite(float(x[i])) for name, x in columns.items()}}
            for i, (site, head) in enumerate(circuit.effects.names)
        ],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def as_csv(found: Found) -> str:
    """Return one line a head: its effect at each stage, and where it looks."""
    names = found.circuit.effects.names
    columns: dict[str, list[Any]] = {"site": [s for s, _ in names], "head": [h for _, h in names]}
    return Table({**columns, **{name: list(map(float, x)) for name, x in _columns(found).items()}}).to_csv()


def _columns(found: Found) -> dict[str, Any]:
    columns: dict[str, Any] = dict(found.circuit.effects.columns)
    if found.labels is not None:
        rows = [found.labels.at(*head) for head in found.circuit.effects.names]
        columns |= {name: [row.get(name, math.nan) for row in rows] for name in found.labels.columns}
    return columns


def _task(name: str | None) -> str:
    if name is None:
        raise RegardError(f"--lens circuits needs a task: --task {', '.join(PAIRED)}.")
    return name


def _number(name: str, value: int | None, default: int, least: int, most: int) -> int:
    if value is None:
        return default
    if not least <= value <= most:
        raise RegardError(f"--{name} is {value}; it must be from {least} to {most}.")
    return value


def _write(path: Path, text: str) -> None:
    if path == given.STANDARD:
        say(text)
    else:
        write_text(path, text)
