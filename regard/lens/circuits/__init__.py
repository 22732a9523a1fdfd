"""Circuits: which heads act on an answer, and through which others (see `discover` and `roles`)."""

from regard.lens.circuits.copying import copying_scores
from regard.lens.circuits.discover import STAGES, Circuit, Stage, discover_circuit
from regard.lens.circuits.edges import Edge, circuit_edges
from regard.lens.circuits.roles import PlaceAttention, label_heads, roles_of
from regard.lens.circuits.truth import KnownCircuit, known_circuit

__all__ = [
    "STAGES",
    "Circuit",
    "Edge",
    "KnownCircuit",
    "PlaceAttention",
    "Stage",
    "circuit_edges",
    "copying_scores",
    "discover_circuit",
    "known_circuit",
    "label_heads",
    "roles_of",
]
