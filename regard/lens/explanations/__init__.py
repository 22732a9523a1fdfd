"""Explanations of a model's output, token by token, and how far they agree: `explain` and its companions."""

from regard.lens.explanations.attention import AttentionPaths, TokenPaths, flow, paths_of, rollout
from regard.lens.explanations.compared import Comparison, compare_methods
from regard.lens.explanations.measures import MEASURES, rank_agreement, top_k
from regard.lens.explanations.methods import METHODS, Explanation, explain
from regard.lens.explanations.pairs import WARNING, Agreement, agreement
from regard.lens.explanations.removal import Faithful, faithfulness
from regard.lens.explanations.subject import Subject, subject_of

__all__ = [
    "MEASURES", "METHODS", "WARNING", "Agreement", "AttentionPaths", "Comparison", "Explanation", "Faithful",
    "Subject", "TokenPaths", "agreement", "compare_methods", "explain", "faithfulness", "flow", "paths_of",
    "rank_agreement", "rollout", "subject_of", "top_k",
]  # fmt: skip
