"""Training: what is lowered, and how."""

from regard.objectives.checkpoint import Log
from regard.objectives.language import Recipe, auxiliary_loss, evaluate, next_token_loss, train

__all__ = ["Log", "Recipe", "auxiliary_loss", "evaluate", "next_token_loss", "train"]
