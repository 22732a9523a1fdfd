"""Landmark attention: blocks of a text read through the landmark token that closes each."""

from regard.attention.landmark.memory_spec import LandmarkMemory
from regard.attention.landmark.spec import Landmark

__all__ = ["Landmark", "LandmarkMemory"]
