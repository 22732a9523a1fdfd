"""Routing attention: tokens attend to those of the same content cluster, found by online k-means."""

from regard.attention.routing.clusters import Clusters
from regard.attention.routing.commitment import commitment_loss
from regard.attention.routing.function import routing_attention
from regard.attention.routing.heads import BalancedHeads, RoutingHeads
from regard.attention.routing.layer import RoutingAttention
from regard.attention.routing.options import Options
from regard.attention.routing.spec import BalancedRouting, Routing

__all__ = [
    "BalancedHeads", "BalancedRouting", "Clusters", "Options", "Routing", "RoutingAttention", "RoutingHeads",
    "commitment_loss", "routing_attention",
]  # fmt: skip
