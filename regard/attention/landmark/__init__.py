"""Landmark attention: blocks of a text read through the landmark token that closes each."""

from regard.attention.landmark.call import landmark_attention, landmark_gates
from regard.attention.landmark.groups import grouped_softmax
from regard.attention.landmark.memory_spec import LandmarkMemory
from regard.attention.landmark.model import LandmarkReader, Landmarks, add_landmark_token
from regard.attention.landmark.spec import Landmark
from regard.attention.landmark.tokens import (
    LandmarkText,
    insert_landmarks,
    jumped_positions,
    remove_landmarks,
)

__all__ = [
    "Landmark",
    "LandmarkMemory",
    "LandmarkReader",
    "LandmarkText",
    "Landmarks",
    "add_landmark_token",
    "grouped_softmax",
    "insert_landmarks",
    "jumped_positions",
    "landmark_attention",
    "landmark_gates",
    "remove_landmarks",
]
