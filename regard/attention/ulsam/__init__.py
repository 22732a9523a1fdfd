"""Subspace attention: one map of weights over the positions for each group of channels.

Source: Saini et al., 2020, arXiv 2006.15102.
"""

from regard.attention.ulsam.layer import ULSAM, Subspaces, fused_weights

__all__ = ["ULSAM", "Subspaces", "fused_weights"]
