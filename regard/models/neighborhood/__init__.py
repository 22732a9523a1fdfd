"""NAT and DiNAT as models of transformers, a small transformer on grids, and transformers' own DiNAT mended.

Importing this registers `NATConfig` with the Auto classes, and NAT and DiNAT by name.
"""

from regard.models.neighborhood.config import NATConfig
from regard.models.neighborhood.dinat import serve_dinat
from regard.models.neighborhood.nat import NATForImageClassification, official_names
from regard.models.neighborhood.small import NeighborhoodTransformer

__all__ = [
    "NATConfig", "NATForImageClassification", "NeighborhoodTransformer", "official_names", "serve_dinat",
]  # fmt: skip
