"""Titans: a neural memory that learns while it reads, alone and joined to attention."""

from regard.attention.titans.context import ContextMemory
from regard.attention.titans.layer import NeuralMemory, NeuralMemoryLayer
from regard.attention.titans.spec import GatedMemory, LayeredMemory, Titans
from regard.engines.memory import Memory, neural_memory

__all__ = [
    "ContextMemory", "GatedMemory", "LayeredMemory", "Memory", "NeuralMemory", "NeuralMemoryLayer", "Titans",
    "neural_memory",
]  # fmt: skip
