"""BiFormer as models of transformers; importing this registers `BiFormerConfig` and the models by name."""

from regard.models.biformer.config import BiFormerConfig
from regard.models.biformer.model import BiFormerForImageClassification, official_names

__all__ = ["BiFormerConfig", "BiFormerForImageClassification", "official_names"]
