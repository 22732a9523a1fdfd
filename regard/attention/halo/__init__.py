"""Halo attention (Vaswani et al., 2021, arXiv 2103.12731): see `function`, `layer` and `replace`."""

from regard.attention.halo.function import halo_attention
from regard.attention.halo.layer import HaloAttention, HaloGrid
from regard.attention.halo.replace import replace_conv3x3
from regard.attention.halo.rules import BORDERS

__all__ = ["BORDERS", "HaloAttention", "HaloGrid", "halo_attention", "replace_conv3x3"]
