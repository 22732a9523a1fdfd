"""Routing transformer: causal language models whose heads attend inside content clusters, or near by.

    x = E[tokens]                                                        x [B, T, dim]
    x = x + routing(norm(x))                                             each layer
    x = x + W_2 (silu(norm(x) W_1) * (norm(x) W_3))
    logits = norm(x) W_head

The mixer is `regard.attention.RoutingAttention`. With the causal selection, the default, it decodes from a
cache of keys, values and the clusters of keys. With "topw", as published, the model's logits depend on later
tokens: its loss in training is lower than what it can predict, and it generates without a cache.

Source: Roy et al., 2020, arXiv 2003.05997, for the mixer; around it stand the norms and MLPs of Llama.
Status: partly our choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from regard.errors import RegardError, UnsupportedModel
from regard.models.gated_mlp import GatedMLP
from regard.models.readout import CausalReadout
from regard.models.routing.config import RoutingConfig
from regard.models.stateful import check_inputs, state_cache, state_layer, valid_positions

NAME = "The routing transformer"


class RoutingMixer(nn.Module):
    """The attention of one layer, with its place in a cache."""

    def __init__(self, config: RoutingConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.layer_idx = config.mixer(layer), layer

    def forward(self, x: Tensor, valid: Tensor | None, past_key_values: Cache | None) -> Tensor:
        """Return the mixed x [B, T, dim], going on from the state in a cache and leaving the new one there.

        Raises:
            RegardError: naming the layer, where the state does not fit.
        """
        if past_key_values is None:
            mixed: Tensor = self.attention(x, valid)
            return mixed
        kept = state_layer(past_key_values, self.layer_idx, NAME)
        try:
            out, state = self.attention.step(x, kept.state, valid)
        except RegardError as error:
            raise type(error)(f"layer {self.layer_idx}: {error}") from None
        kept.state, kept.is_initialized = state, True
        kept.length += x.shape[1]
        return out


class RoutingDecoderLayer(GradientCheckpointingLayer):
    """One layer: attention, then MLP, each on the normalised residual stream."""

    def __init__(self, config: RoutingConfig, layer: int) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = (
            nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2)
        )
        self.mixer = RoutingMixer(config, layer)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, valid: Tensor | None = None, past_key_values: Cache | None = None
    ) -> Tensor:
        hidden_states = hidden_states + self.mixer(self.input_norm(hidden_states), valid, past_key_values)
        out: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return out


class RoutingPreTrainedModel(PreTrainedModel):
    """What the models share: loading, saving, initial weights."""

    config: RoutingConfig
    config_class = RoutingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RoutingDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": RoutingDecoderLayer}  # noqa: RUF012


class RoutingModel(RoutingPreTrainedModel):
    """The layers, from tokens to the last norm."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RoutingDecoderLayer(config, i) for i in range(config.num_hidden_layers))
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
            use_cache: whether to return one; never in training, or with the selection "topw".

        Raises:
            UnsupportedModel: for a cache with the selection "topw".
        """
        check_inputs(input_ids, inputs_embeds, kwargs, NAME)
        if self.config.selection == "topw" and (use_cache or past_key_values is not None):
            raise UnsupportedModel(
                f"{NAME} with selection='topw' chooses clusters among all tokens and cannot go on from a "
                "cache; give use_cache=False, or load it with selection='causal'."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.training and past_key_values is None and not use_cache:
            use_cache = False
        past_key_values = state_cache(self, past_key_values, use_cache, NAME)
        valid = valid_positions(attention_mask, inputs_embeds, past_key_values, NAME)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, valid=valid, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )


class RoutingForCausalLM(CausalReadout, RoutingPreTrainedModel, GenerationMixin):
    """The routing transformer with a readout: loss, `generate()`, saving and loading.

    In training the loss of labels has `config.commitment` times the commitment loss added.

    Example:
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
        >>> model = RoutingForCausalLM(RoutingConfig(**sizes, num_attention_heads=4, clusters=4)).eval()
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.model = RoutingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def auxiliary(self) -> Tensor | None:
        """Return the commitment loss of all layers times `config.commitment`; None where none trained."""
        found = [layer.mixer.attention.mechanism.auxiliary() for layer in self.model.layers]
        losses = [loss for loss in found if loss is not None]
        return torch.stack(losses).sum() if losses else None
