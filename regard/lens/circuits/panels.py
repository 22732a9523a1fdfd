"""A circuit in sentences and pictures: its heads by stage, maps of effects, and a graph of its edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from regard.lens.circuits.discover import Circuit
from regard.lens.circuits.edges import Edge
from regard.runtime.activations import ActivationEffects
from regard.runtime.findings import Finding
from regard.runtime.head_table import Head, HeadTable, split
from regard.runtime.panels import GraphPanel, Link, MapPanel, Node, Panel, head_map

LENS, ANSWER = "circuits", "answer"
NAMED = 5
LEAST = 0.02


def short_name(head: Head) -> str:
    """Return a head as `layer.head`.

    Example:
        >>> short_name(("text.23", 3))
        '23.3'
    """
    return f"{split(head[0])[1]}.{head[1]}"


def circuit_findings(
    circuit: Circuit, roles: Mapping[str, Sequence[Head]], *, least: float = LEAST
) -> list[Finding]:
    """Say which heads each stage keeps and what they do, and which head has which role.

    Args:
        roles: from `roles_of`; may be empty.
        least: smallest |effect| of a head that is named.
    """
    found = []
    for stage in circuit.stages:
        heads = circuit.heads(stage, least=least)
        effects = [circuit.effects.at(*head)[stage] for head in heads]
        named = ", ".join(
            f"{short_name(h)} {x:+.2f}" for h, x in zip(heads[:NAMED], effects[:NAMED], strict=True)
        )
        more = f" and {len(heads) - NAMED} more" if len(heads) > NAMED else ""
        none = f"no head does as much as {least:.0%} of the corrupt prompts' change"
        alike = circuit.effects.about.get("stability", {}).get(stage)
        said = f"{stage.capitalize()}: {named + more if heads else none}"
        if alike is not None:
            said += f"; two halves of the prompts rank all heads with correlation {alike:.2f}"
        found.append(Finding(f"{said}.", tuple(heads), LENS))
    members = set(circuit.heads(least=least))
    for role, having in roles.items():
        inside = [head for head in having if head in members]
        if inside:
            named = ", ".join(map(short_name, inside))
            said = f"By where it looks and what it writes, {named} is {_article(role)} {role} head."
            if len(inside) > 1:
                said = f"By where they look and what they write, {named} are {role} heads."
            found.append(Finding(said, tuple(inside), LENS))
    return found


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def circuit_panels(
    circuit: Circuit,
    labels: HeadTable | None = None,
    edges: Sequence[Edge] = (),
    *,
    roles: Mapping[str, Sequence[Head]] | None = None,
    least: float = LEAST,
) -> list[Panel]:
    """Return the maps of effects and of places looked at, and the graph where there are edges.

    Args:
        labels: from `label_heads`.
        edges: from `circuit_edges`.
        roles: from `roles_of`, written on the heads of the graph.
        least: smallest |effect| of an edge that is drawn.
    """
    about = {
        "lens": LENS,
        "definition": "effect of the path from a head to the stage before, over the whole change from clean "
        "to corrupt prompts: 1 is as bad as the corrupt prompt",
    }
    panels: list[Panel] = [head_map(replace(circuit.effects, about=about))]
    if labels is not None:
        panels.append(head_map(replace(labels, about={**labels.about, "lens": "places"})))
    drawn = [edge for edge in edges if abs(edge.effect) >= least]
    return [_graph(circuit, drawn, roles or {}), *panels] if drawn else panels


def patched_panels(patched: ActivationEffects, tokens: Sequence[str]) -> list[Panel]:
    """Return the map of layers by tokens, and that of heads.

    Args:
        patched: from `activation_patch`.
        tokens: words of its positions.
    """
    note = (
        "how much of the answer comes back where one thing of the clean prompt is put into the corrupt one: "
        "1 is all of it"
    )
    layers = [str(split(site)[1]) for site in patched.sites]
    panels: list[Panel] = [
        MapPanel(
            title="Patched by layer and token",
            rows=layers,
            columns=list(tokens),
            values=patched.layers,
            note=note,
        )
    ]
    if patched.heads is not None:
        about = {**patched.heads.about, "lens": "patched", "definition": note}
        panels.append(
            head_map(replace(patched.heads, columns={"effect": patched.heads["effect"]}, about=about))
        )
    return panels


def _graph(circuit: Circuit, edges: Sequence[Edge], roles: Mapping[str, Sequence[Head]]) -> GraphPanel:
    """Heads by the stage that first names them, the answer at the right."""
    column = {stage: len(circuit.stages) - 1 - n for n, stage in enumerate(circuit.stages)}
    place: dict[Head, int] = {}
    for edge in edges:
        place.setdefault(edge.sender, column[edge.stage])
    for edge in edges:
        if edge.receiver is not None:
            place.setdefault(edge.receiver, max(place.values()))
    role = {head: name for name, heads in reversed(list(roles.items())) for head in heads}
    nodes = [
        Node(short_name(head), at, f"{short_name(head)} {role.get(head, '')}".strip(), head)
        for head, at in sorted(place.items(), key=lambda item: (item[1], split(item[0][0])[1], item[0][1]))
    ]
    links = [
        Link(
            short_name(edge.sender),
            ANSWER if edge.receiver is None else short_name(edge.receiver),
            edge.effect,
        )
        for edge in edges
    ]
    return GraphPanel(
        title=f"The circuit of {circuit.task.replace('_', ' ')}",
        nodes=[*nodes, Node(ANSWER, len(circuit.stages), "answer")],
        links=links,
        note="An edge is the effect of the path from one head to the next, or to the answer: from "
        + ", from ".join(f"{stage} ({len(circuit.heads(stage))} heads kept)" for stage in circuit.stages)
        + ". Click a head for its pattern.",
    )
