"""Lightning Attention: causal linear attention with a decay of each head, at one speed for any length."""

from regard.attention.lightning.heads import LightningAttention, LightningHeads
from regard.attention.lightning.layer import LightningLayer, LightningMixer, Lrpe
from regard.attention.lightning.operator import METHODS, lightning_attention
from regard.attention.lightning.rates import KINDS, decay_rates

__all__ = [
    "KINDS", "METHODS", "LightningAttention", "LightningHeads", "LightningLayer", "LightningMixer", "Lrpe",
    "decay_rates", "lightning_attention",
]  # fmt: skip
