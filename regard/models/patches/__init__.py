"""The two usual models of equal patches, as baselines: a plain ViT and an MLP-Mixer."""

from regard.models.patches.mixer import MLPMixerConfig, MLPMixerForImageClassification
from regard.models.patches.vit import GridAttention, PlainViTConfig, PlainViTForImageClassification

__all__ = [
    "GridAttention", "MLPMixerConfig", "MLPMixerForImageClassification", "PlainViTConfig",
    "PlainViTForImageClassification",
]  # fmt: skip
