"""Circuits: which heads act on an answer, and through which others (see `discover` and `roles`)."""

from regard.lens.circuits.discover import STAGES, Circuit, Stage, discover_circuit
from regard.lens.circuits.roles import PlaceAttention, label_heads, roles_of
from regard.lens.circuits.truth import KnownCircuit, known_circuit

__all__ = [
    "STAGES",
    "Circuit",
    "KnownCircuit",
    "PlaceAttention",
    "Stage",
    "discover_circuit",
    "known_circuit",
    "label_heads",
    "roles_of",
]
