"""How familiar a concept is to a model, and the gate that withholds answers about unfamiliar ones."""

from regard.lens.familiarity.gate import Decision, Gate
from regard.lens.familiarity.scoring import Familiarity, InstructionScore, SelfFamiliarity, aggregate
from regard.lens.familiarity.threshold import Threshold, calibrate, everyday_concepts

__all__ = [
    "Decision",
    "Familiarity",
    "Gate",
    "InstructionScore",
    "SelfFamiliarity",
    "Threshold",
    "aggregate",
    "calibrate",
    "everyday_concepts",
]
