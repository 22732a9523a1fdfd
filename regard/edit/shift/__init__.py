"""Steering by vectors in the residual stream: means of two sets, two concepts, or what fine-tuning moved."""

from regard.edit.shift.adding import AddVector
from regard.edit.shift.direction import Direction, between_concepts, mean_difference, of_shift

__all__ = ["AddVector", "Direction", "between_concepts", "mean_difference", "of_shift"]
