"""HaloNet as models of transformers; importing this registers `HaloNetConfig` and the models by name."""

from regard.models.halonet.config import HaloNetConfig
from regard.models.halonet.model import HaloNetForImageClassification

__all__ = ["HaloNetConfig", "HaloNetForImageClassification"]
