"""Adversarial training on attention scores: with labels (`AttentionAdversary`), or without."""

from regard.objectives.adversarial.labelled import AttentionAdversary
from regard.objectives.adversarial.loss import AdversarialLoss
from regard.objectives.adversarial.port import ScorePort
from regard.objectives.adversarial.reach import AttendingPort, reach
from regard.objectives.adversarial.virtual import AttentionVirtualAdversary

__all__ = [
    "AdversarialLoss",
    "AttendingPort",
    "AttentionAdversary",
    "AttentionVirtualAdversary",
    "ScorePort",
    "reach",
]
