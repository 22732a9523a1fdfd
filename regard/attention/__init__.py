"""Mechanisms: what can stand in the place of softmax attention, each with its definition and a fast path."""

from regard.attention.biformer import (
    BRA,
    BiLevelRouting,
    BiLevelRoutingGrid,
    RegionRouting,
    bi_level_routing_attention,
)
from regard.attention.block import Block, Maps
from regard.attention.clipped import ClippedSoftmax
from regard.attention.flow import FlowAttention, flow_attention
from regard.attention.gated import Gated
from regard.attention.halo import HaloAttention, HaloGrid, halo_attention, replace_conv3x3
from regard.attention.hip import HiP, HiPMask, hip_attention, hip_mask
from regard.attention.kernel import Kernel
from regard.attention.key_value_bias import KeyValueBias
from regard.attention.landmark import Landmark, LandmarkMemory, add_landmark_token, landmark_attention
from regard.attention.large_kernel import LargeKernel, LargeKernelAttention, LKABlock, LKALayer
from regard.attention.lightnet import LightNet, LightNetGrid, LightNetText
from regard.attention.lightning import LightningAttention, LightningLayer, decay_rates, lightning_attention
from regard.attention.linear import LinearAttention
from regard.attention.mechanism import Context, Mechanism
from regard.attention.moh import (
    HeadRouter,
    MixtureOfHeads,
    MoHAttention,
    balance_loss,
    head_usage,
    moh_attention,
)
from regard.attention.multi_head import MultiHeadAttention
from regard.attention.neighborhood import (
    Neighborhood,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodGrid,
    na1d,
    na2d,
    na3d,
    neighborhood_mask,
)
from regard.attention.ninformer import NiN, NiNBlock, NiNGating, NiNMixer
from regard.attention.normalized import NormalizedAttention
from regard.attention.qlstm import QLSTM
from regard.attention.registry import MECHANISMS, Spec, from_dict, get, mechanism
from regard.attention.routing import (
    BalancedRouting,
    Clusters,
    Routing,
    RoutingAttention,
    commitment_loss,
    routing_attention,
)
from regard.attention.similarity import Similarity
from regard.attention.sliding_window import SlidingWindow
from regard.attention.softmax import Softmax
from regard.attention.softplus import LSSA, LSSAR
from regard.attention.titans import NeuralMemory, Titans
from regard.attention.ulsam import ULSAM, Subspaces

__all__ = [
    "BRA",
    "LSSA",
    "LSSAR",
    "MECHANISMS",
    "QLSTM",
    "ULSAM",
    "BalancedRouting",
    "BiLevelRouting",
    "BiLevelRoutingGrid",
    "Block",
    "ClippedSoftmax",
    "Clusters",
    "Context",
    "FlowAttention",
    "Gated",
    "HaloAttention",
    "HaloGrid",
    "HeadRouter",
    "HiP",
    "HiPMask",
    "Kernel",
    "KeyValueBias",
    "LKABlock",
    "LKALayer",
    "Landmark",
    "LandmarkMemory",
    "LargeKernel",
    "LargeKernelAttention",
    "LightNet",
    "LightNetGrid",
    "LightNetText",
    "LightningAttention",
    "LightningLayer",
    "LinearAttention",
    "Maps",
    "Mechanism",
    "MixtureOfHeads",
    "MoHAttention",
    "MultiHeadAttention",
    "Neighborhood",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodGrid",
    "NeuralMemory",
    "NiN",
    "NiNBlock",
    "NiNGating",
    "NiNMixer",
    "NormalizedAttention",
    "RegionRouting",
    "Routing",
    "RoutingAttention",
    "Similarity",
    "SlidingWindow",
    "Softmax",
    "Spec",
    "Subspaces",
    "Titans",
    "add_landmark_token",
    "balance_loss",
    "bi_level_routing_attention",
    "commitment_loss",
    "decay_rates",
    "flow_attention",
    "from_dict",
    "get",
    "halo_attention",
    "head_usage",
    "hip_attention",
    "hip_mask",
    "landmark_attention",
    "lightning_attention",
    "mechanism",
    "moh_attention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_mask",
    "replace_conv3x3",
    "routing_attention",
]  # fmt: skip
