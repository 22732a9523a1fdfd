"""Edits: change attention while a model runs. Those of general use are here."""

from regard.edit.act import ACT
from regard.edit.experts import TuneExperts
from regard.edit.registry import EDITS, edit, find_edit
from regard.edit.shift.adding import AddVector
from regard.runtime.edits import (
    EditWeights,
    ForceAttention,
    ScaleHeads,
    ScoreBias,
    check_row_local,
    force_attention,
    redistribute,
)

edit("scale-heads")(ScaleHeads)
edit("edit-weights")(EditWeights)
edit("force-attention")(ForceAttention)
edit("score-bias")(ScoreBias)

__all__ = [
    "ACT",
    "EDITS",
    "AddVector",
    "EditWeights",
    "ForceAttention",
    "ScaleHeads",
    "ScoreBias",
    "TuneExperts",
    "check_row_local",
    "edit",
    "find_edit",
    "force_attention",
    "redistribute",
]
