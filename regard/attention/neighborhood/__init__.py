"""Neighbourhood attention (Hassani et al., 2024, arXiv 2403.04690): see `function`, `heads` and `layer`."""

from regard.attention.neighborhood.explicit import natten2dav, natten2dqkrpb
from regard.attention.neighborhood.function import na1d, na2d, na3d
from regard.attention.neighborhood.heads import Neighborhood
from regard.attention.neighborhood.layer import NeighborhoodAttention, NeighborhoodGrid
from regard.attention.neighborhood.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from regard.attention.neighborhood.rules import neighborhood_index, neighborhood_mask

__all__ = [
    "Neighborhood", "NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D",
    "NeighborhoodAttention3D", "NeighborhoodGrid", "na1d", "na2d", "na3d", "natten2dav", "natten2dqkrpb",
    "neighborhood_index", "neighborhood_mask",
]  # fmt: skip
