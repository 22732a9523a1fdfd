"""TransNormerLLM as a model of transformers; importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from regard.models.transnormer.config import TNLConfig
from regard.models.transnormer.model import TNLForCausalLM, TNLModel, TNLPreTrainedModel

AutoConfig.register(TNLConfig.model_type, TNLConfig, exist_ok=True)
AutoModel.register(TNLConfig, TNLModel, exist_ok=True)
AutoModelForCausalLM.register(TNLConfig, TNLForCausalLM, exist_ok=True)

__all__ = ["TNLConfig", "TNLForCausalLM", "TNLModel", "TNLPreTrainedModel"]
