"""Training: what is lowered, and how."""

from regard.objectives.checkpoint import Log
from regard.objectives.confusion import Confusion, confusion
from regard.objectives.images import ImageRecipe, train_images
from regard.objectives.language import Recipe, auxiliary_loss, evaluate, next_token_loss, train

__all__ = [
    "Confusion", "ImageRecipe", "Log", "Recipe", "auxiliary_loss", "confusion", "evaluate", "next_token_loss",
    "train", "train_images",
]  # fmt: skip
