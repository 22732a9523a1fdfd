"""Mechanisms: what can stand in the place of softmax attention, each with its definition and a fast path."""

from regard.attention.block import Block
from regard.attention.lightning import LightningAttention, LightningLayer, decay_rates, lightning_attention
from regard.attention.linear import LinearAttention
from regard.attention.mechanism import Context, Mechanism
from regard.attention.multi_head import MultiHeadAttention
from regard.attention.normalized import NormalizedAttention
from regard.attention.qlstm import QLSTM
from regard.attention.registry import MECHANISMS, Spec, from_dict, get, mechanism
from regard.attention.sliding_window import SlidingWindow
from regard.attention.softmax import Softmax

__all__ = [
    "MECHANISMS",
    "QLSTM",
    "Block",
    "Context",
    "LightningAttention",
    "LightningLayer",
    "LinearAttention",
    "Mechanism",
    "MultiHeadAttention",
    "NormalizedAttention",
    "SlidingWindow",
    "Softmax",
    "Spec",
    "decay_rates",
    "from_dict",
    "get",
    "lightning_attention",
    "mechanism",
]
