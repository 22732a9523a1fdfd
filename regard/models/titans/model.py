"""Titans: causal language models whose layers join attention to a neural memory.

    x = E[tokens]                                                        x [B, T, dim]
    x = x + titans(norm(x))                                              each layer, one of MAC, MAG, MAL, LMM
    x = x + W_2 (silu(norm(x) W_1) * (norm(x) W_3))
    logits = norm(x) W_head

The mixers are `regard.attention.Titans` and `NeuralMemory`. A layer keeps a short window of keys and values
and the weights of its memories, so a token costs the same however many came before.

Source: Behrouz et al., 2024, arXiv 2501.00663, sections 4 and 5, for the mixers; around them stand the norms
and MLPs of Llama. Status: partly our choice; there is no official code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from regard.attention.titans.core import Gate
from regard.attention.titans.parts import ShortConvolution
from regard.errors import RegardError
from regard.models.gated_mlp import GatedMLP
from regard.models.readout import CausalReadout
from regard.models.stateful import check_inputs, state_cache, state_layer, valid_positions
from regard.models.titans.config import TitansConfig

NAME = "Titans"


class TitansMixer(nn.Module):
    """The mechanism of one layer, with its place in a cache."""

    block: Any

    def __init__(self, config: TitansConfig, layer: int) -> None:
        super().__init__()
        self.block, self.layer_idx = config.spec().build(), layer

    def forward(self, x: Tensor, valid: Tensor | None, past_key_values: Cache | None) -> Tensor:
        """Return the mixed x [B, T, dim], going on from the state in a cache and leaving the new one there.

        Raises:
            RegardError: naming the layer, where its memory diverges or the state does not fit.
        """
        kept = None if past_key_values is None else state_layer(past_key_values, self.layer_idx, NAME)
        try:
            out, state = self.block.step(x, None if kept is None else kept.state, valid)
        except RegardError as error:
            raise type(error)(f"layer {self.layer_idx}: {error}") from None
        if kept is not None:
            kept.state, kept.is_initialized = state, True
            kept.length += x.shape[1]
        mixed: Tensor = out
        return mixed


class TitansDecoderLayer(GradientCheckpointingLayer):
    """One layer: mixer, then MLP, each on the normalised residual stream."""

    def __init__(self, config: TitansConfig, layer: int) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = (
            nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2)
        )
        self.mixer = TitansMixer(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, valid: Tensor | None = None, past_key_values: Cache | None = None
    ) -> Tensor:
        hidden_states = hidden_states + self.mixer(self.input_norm(hidden_states), valid, past_key_values)
        out: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return out


class TitansPreTrainedModel(PreTrainedModel):
    """What the models share: loading, saving, initial weights."""

    config: TitansConfig
    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": TitansDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            init.constant_(module.bias, module.first)
        elif isinstance(module, nn.ParameterList):
            for weight in module:
                init.normal_(weight, std=weight.shape[-2] ** -0.5)
        elif isinstance(module, ShortConvolution):
            bound = (module.kept + 1) ** -0.5
            init.uniform_(module.filters, -bound, bound)
            init.zeros_(module.bias)
        if isinstance(getattr(module, "persistent", None), nn.Parameter):
            init.normal_(module.persistent)


class TitansModel(TitansPreTrainedModel):
    """The layers, from tokens to the last norm."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TitansDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the residual stream after the last norm, [B, T, dim], and the cache.

        Args:
            input_ids: int64 [B, T]; or `inputs_embeds` [B, T, dim].
            attention_mask: [B, T], or [B, all positions] with a cache; 0 at padding, wherever it stands.
            past_key_values: what this returned before, or an empty dynamic cache.
            use_cache: whether to return one.
        """
        check_inputs(input_ids, inputs_embeds, kwargs, NAME)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past_key_values = state_cache(self, past_key_values, use_cache, NAME)
        valid = valid_positions(attention_mask, inputs_embeds, past_key_values, NAME)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, valid=valid, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )


class TitansForCausalLM(CausalReadout, TitansPreTrainedModel, GenerationMixin):
    """Titans with a readout: loss, `generate()`, saving and loading as any model of transformers.

    Example:
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
        >>> model = TitansForCausalLM(TitansConfig(**sizes, num_attention_heads=4, variant="mag")).eval()
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
