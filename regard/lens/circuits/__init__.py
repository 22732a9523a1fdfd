"""Circuits: which heads act on an answer, and through which others (see `discover` and `roles`)."""

from regard.lens.circuits.discover import STAGES, Circuit, Stage, discover_circuit
from regard.lens.circuits.roles import PlaceAttention, label_heads, roles_of

__all__ = ["STAGES", "Circuit", "PlaceAttention", "Stage", "discover_circuit", "label_heads", "roles_of"]
