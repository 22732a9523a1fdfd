"""LightNet as models of transformers; importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
)

from regard.models.lightnet.config import LightNetConfig
from regard.models.lightnet.image import LightNetForImageClassification
from regard.models.lightnet.parts import LightNetPreTrainedModel
from regard.models.lightnet.text import LightNetForCausalLM, LightNetForMaskedLM, LightNetModel

AutoConfig.register(LightNetConfig.model_type, LightNetConfig, exist_ok=True)
AutoModel.register(LightNetConfig, LightNetModel, exist_ok=True)
AutoModelForCausalLM.register(LightNetConfig, LightNetForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LightNetConfig, LightNetForMaskedLM, exist_ok=True)
AutoModelForImageClassification.register(LightNetConfig, LightNetForImageClassification, exist_ok=True)

__all__ = [
    "LightNetConfig", "LightNetForCausalLM", "LightNetForImageClassification", "LightNetForMaskedLM",
    "LightNetModel", "LightNetPreTrainedModel",
]  # fmt: skip
