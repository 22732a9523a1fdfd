"""Neural memories: small networks whose weights are a recurrent state, trained on every position."""

from regard.engines.memory.drive import neural_memory
from regard.engines.memory.network import ACTIVATIONS, apply
from regard.engines.memory.state import Memory, Weights

__all__ = ["ACTIVATIONS", "Memory", "Weights", "apply", "neural_memory"]
