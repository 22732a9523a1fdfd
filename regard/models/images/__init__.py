"""What all image models share: their base class, their names, published weights, and what they cost.

A family is a package of `regard.models` with a config and a model; docs/build.md has one that runs.
"""

from regard.models.images.base import ImageConfig, ImageModel
from regard.models.images.cost import Cost, cost
from regard.models.images.matching import matched
from regard.models.images.patches import PatchConfig, PatchModel
from regard.models.images.paths import DropPath, drop_rates
from regard.models.images.published import load_published
from regard.models.images.registry import image_family, image_model, image_models
from regard.models.images.saved import load_image_model, save_image_model

__all__ = [
    "Cost", "DropPath", "ImageConfig", "ImageModel", "PatchConfig", "PatchModel", "cost", "drop_rates",
    "image_family", "image_model", "image_models", "load_image_model", "load_published", "matched",
    "save_image_model",
]  # fmt: skip
