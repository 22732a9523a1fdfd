"""Lenses: what can be measured while a model runs, one file a measurement."""

from regard.lens.column_mass import ColumnMass
from regard.lens.duplicate_token import DuplicateToken
from regard.lens.entropy import Entropy
from regard.lens.extremes import ContrastTable, Extremes, compare_sinks, measure_sinks
from regard.lens.head_output_norm import HeadOutputNorm
from regard.lens.image_maps import ImageMaps
from regard.lens.image_result import SeenMaps
from regard.lens.induction import Induction
from regard.lens.mean_distance import MeanDistance
from regard.lens.outliers import Outliers
from regard.lens.patterns import Patterns
from regard.lens.previous_token import PreviousToken
from regard.lens.registry import LENSES, find_lens, lens
from regard.lens.residual_norm import ResidualNorm
from regard.lens.routed import Routed
from regard.lens.sink_logit import SinkLogit
from regard.lens.sinks import Sinks
from regard.lens.value_norm import ValueNorm

__all__ = [
    "LENSES",
    "ColumnMass",
    "ContrastTable",
    "DuplicateToken",
    "Entropy",
    "Extremes",
    "HeadOutputNorm",
    "ImageMaps",
    "Induction",
    "MeanDistance",
    "Outliers",
    "Patterns",
    "PreviousToken",
    "ResidualNorm",
    "Routed",
    "SeenMaps",
    "SinkLogit",
    "Sinks",
    "ValueNorm",
    "compare_sinks",
    "find_lens",
    "lens",
    "measure_sinks",
]
