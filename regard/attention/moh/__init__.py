"""Mixture of heads: tokens choose which attention heads they use, in new layers and in pretrained models."""

from regard.attention.moh.balance import HeadUsage, balance_loss, head_usage
from regard.attention.moh.function import moh_attention
from regard.attention.moh.layer import MoHAttention
from regard.attention.moh.router import HeadRouter
from regard.attention.moh.spec import PUBLISHED, MixtureOfHeads

__all__ = [
    "PUBLISHED", "HeadRouter", "HeadUsage", "MixtureOfHeads", "MoHAttention", "balance_loss", "head_usage",
    "moh_attention",
]  # fmt: skip
