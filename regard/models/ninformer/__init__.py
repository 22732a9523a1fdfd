"""NiNformer: a stack of blocks, an image model, and a mixer in the place of another model's attention."""

from regard.models.ninformer.hosting import Replaced, replace_attention
from regard.models.ninformer.image import NiNformerConfig, NiNformerForImageClassification
from regard.models.ninformer.stack import NiNformer

__all__ = [
    "NiNformer", "NiNformerConfig", "NiNformerForImageClassification", "Replaced", "replace_attention",
]  # fmt: skip
