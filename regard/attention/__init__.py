"""Mechanisms: what can stand in the place of softmax attention, each with its definition and a fast path."""

from regard.attention.block import Block
from regard.attention.linear import LinearAttention
from regard.attention.mechanism import Context, Mechanism
from regard.attention.normalized import NormalizedAttention
from regard.attention.qlstm import QLSTM
from regard.attention.registry import MECHANISMS, Spec, from_dict, get, mechanism
from regard.attention.sliding_window import SlidingWindow
from regard.attention.softmax import Softmax

__all__ = [
    "MECHANISMS", "QLSTM", "Block", "Context", "LinearAttention", "Mechanism", "NormalizedAttention",
    "SlidingWindow", "Softmax", "Spec", "from_dict", "get", "mechanism",
]  # fmt: skip
