"""Studies: each paper's own claim, run small, and reported as it fell; one file a study."""

from regard.studies.base import Step, Study
from regard.studies.claims import FAILS, HOLDS, UNKNOWN, Claim, Quantity, Rule
from regard.studies.outcome import Outcome, outcomes_in, read_outcome
from regard.studies.registry import STUDIES, all_studies, find_study, study
from regard.studies.running import run

__all__ = [
    "FAILS",
    "HOLDS",
    "STUDIES",
    "UNKNOWN",
    "Claim",
    "Outcome",
    "Quantity",
    "Rule",
    "Step",
    "Study",
    "all_studies",
    "find_study",
    "outcomes_in",
    "read_outcome",
    "run",
    "study",
]
