"""Mechanisms: what can stand in the place of softmax attention, each with its definition and a fast path."""

from regard.attention.linear import LinearAttention
from regard.attention.mechanism import MECHANISMS, Context, Mechanism, Spec, from_dict, get, mechanism
from regard.attention.sliding_window import SlidingWindow
from regard.attention.softmax import Softmax

__all__ = [
    "MECHANISMS", "Context", "LinearAttention", "Mechanism", "SlidingWindow", "Softmax", "Spec", "from_dict",
    "get", "mechanism",
]  # fmt: skip
