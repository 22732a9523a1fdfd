"""The routing transformer as models of transformers; importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from regard.models.routing.config import RoutingConfig
from regard.models.routing.model import RoutingForCausalLM, RoutingModel, RoutingPreTrainedModel

AutoConfig.register(RoutingConfig.model_type, RoutingConfig, exist_ok=True)
AutoModel.register(RoutingConfig, RoutingModel, exist_ok=True)
AutoModelForCausalLM.register(RoutingConfig, RoutingForCausalLM, exist_ok=True)

__all__ = ["RoutingConfig", "RoutingForCausalLM", "RoutingModel", "RoutingPreTrainedModel"]
