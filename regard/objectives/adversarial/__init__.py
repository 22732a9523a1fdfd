"""Adversarial training on attention scores: with labels (`AttentionAdversary`), or without."""

from regard.objectives.adversarial.labelled import AttentionAdversary
from regard.objectives.adversarial.port import ScorePort
from regard.objectives.adversarial.virtual import AttentionVirtualAdversary

__all__ = ["AttentionAdversary", "AttentionVirtualAdversary", "ScorePort"]
