"""Bi-level routing attention (Zhu et al., 2023, arXiv 2303.08810): see `function`, `layer` and `heads`."""

from regard.attention.biformer.function import bi_level_routing_attention
from regard.attention.biformer.heads import BiLevelRouting
from regard.attention.biformer.layer import BRA, BiLevelRoutingGrid, own_names
from regard.attention.biformer.regions import Regions
from regard.attention.biformer.route import RegionRouting
from regard.attention.biformer.whole import LePEAttention

__all__ = [
    "BRA", "BiLevelRouting", "BiLevelRoutingGrid", "LePEAttention", "RegionRouting", "Regions",
    "bi_level_routing_attention", "own_names",
]  # fmt: skip
