"""Circuits: which heads act on an answer, and through which others; how well others' scores find them.

`discover`, `edges` and `roles` patch paths; `sae` scores heads by sparse codes and `evaluation` holds scores
against a circuit; `choosing`, `choice_roles` and `subspaces` take multiple choice apart.
"""

from regard.lens.circuits.choice_roles import ChoiceHeads, categorise
from regard.lens.circuits.choosing import Answered, answer_choices
from regard.lens.circuits.codes import Codes
from regard.lens.circuits.compressing import compress, fit_choices, mutate
from regard.lens.circuits.copying import copying_scores
from regard.lens.circuits.discover import STAGES, Circuit, Stage, discover_circuit
from regard.lens.circuits.edges import Edge, circuit_edges
from regard.lens.circuits.evaluation import Evaluation, evaluate
from regard.lens.circuits.head_results import HeadResults, head_results
from regard.lens.circuits.roles import PlaceAttention, label_heads, roles_of
from regard.lens.circuits.sae import CircuitScores, baseline_scores, sae_scores, score_results
from regard.lens.circuits.subspaces import Subspaces, fit_subspaces
from regard.lens.circuits.truth import KnownCircuit, known_circuit

__all__ = [
    "STAGES",
    "Answered",
    "ChoiceHeads",
    "Circuit",
    "CircuitScores",
    "Codes",
    "Edge",
    "Evaluation",
    "HeadResults",
    "KnownCircuit",
    "PlaceAttention",
    "Stage",
    "Subspaces",
    "answer_choices",
    "baseline_scores",
    "categorise",
    "circuit_edges",
    "compress",
    "copying_scores",
    "discover_circuit",
    "evaluate",
    "fit_choices",
    "fit_subspaces",
    "head_results",
    "known_circuit",
    "label_heads",
    "mutate",
    "roles_of",
    "sae_scores",
    "score_results",
]
