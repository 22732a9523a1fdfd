"""Edits of general use: scale heads, rewrite weights, force attention, add a bias to the scores."""

from regard.runtime.edits.bias import ScoreBias
from regard.runtime.edits.forced import ForceAttention, force_attention
from regard.runtime.edits.locality import check_row_local
from regard.runtime.edits.redistribute import redistribute
from regard.runtime.edits.scale import ScaleHeads
from regard.runtime.edits.weights import EditWeights

__all__ = [
    "EditWeights",
    "ForceAttention",
    "ScaleHeads",
    "ScoreBias",
    "check_row_local",
    "force_attention",
    "redistribute",
]
