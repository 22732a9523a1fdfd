"""Titans as models of transformers; importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from regard.models.titans.config import TitansConfig
from regard.models.titans.model import TitansForCausalLM, TitansModel, TitansPreTrainedModel

AutoConfig.register(TitansConfig.model_type, TitansConfig, exist_ok=True)
AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)

__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel", "TitansPreTrainedModel"]
