"""TransNormerLLM: a causal language model of gated lightning attention and gated MLPs.

    x = sqrt(dim) E[tokens]                                              x [B, T, dim]
    x = x + GLA(norm(x))                                                 each layer
    x = x + ((norm(x) W_1) * (norm(x) W_2)) W_3
    logits = norm(x) W_head

norm is x / sqrt(mean(x^2) + 1e-6), without weights; GLA is `regard.attention.LightningLayer`, rotated (LRPE)
in the first layer alone. It keeps one matrix a head instead of keys and values, so a token costs the same
however many came before.

Source: Qin et al., 2023, arXiv 2307.14995, and 2024, arXiv 2405.17381, section 3.4. Parameter names and
equations are those of the model code that OpenNLPLab's checkpoints carry. Status: agrees with that code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from regard.attention.lightning import LightningMixer, Lrpe, decay_rates
from regard.attention.lightning.layer import NORMS, initial_angles
from regard.errors import ShapeMismatch
from regard.models.readout import CausalReadout
from regard.models.stateful import check_inputs, state_cache, state_layer, valid_positions
from regard.models.transnormer.config import TNLConfig

NAME = "TransNormerLLM"
NORM_TYPES = {"simplermsnorm": "srms", "layernorm": "layer"}


class TNLLightningAttention(LightningMixer):
    """Gated lightning attention of one layer, with its place in a cache."""

    def __init__(self, config: TNLConfig, layer: int) -> None:
        heads = config.decoder_attention_heads
        super().__init__(
            dim=config.decoder_embed_dim, heads=heads, width=config.hidden_dim // heads,
            rates=decay_rates(heads, layer, config.decoder_layers, config.decay),
            activation=config.linear_act_fun, activation_v=False, norm=NORM_TYPES[config.norm_type],
            gate="linear", lrpe=bool((config.linear_use_lrpe_list or [0] * config.decoder_layers)[layer]),
            bias=config.bias, chunk_size=config.chunk_size,
        )  # fmt: skip
        self.layer_idx = layer

    def forward(self, x: Tensor, mask: Tensor | None = None, past_key_values: Cache | None = None) -> Tensor:
        """Return the mixed x [B, T, dim], from the state in a cache on, and leave the new one there."""
        if past_key_values is None:
            return super().forward(x, mask)
        layer = state_layer(past_key_values, self.layer_idx, NAME)
        if layer.state is not None and layer.state[0].shape[0] != x.shape[0]:
            raise ShapeMismatch(
                f"this cache holds states of {layer.state[0].shape[0]} sequences, and "
                f"{x.shape[0]} were given."
            )
        out, layer.state = self.step(x, layer.state, mask)
        layer.length += x.shape[1]
        layer.is_initialized = True
        return out


class TNLGLU(nn.Module):
    """The product of two linear maps, projected back."""

    def __init__(self, config: TNLConfig) -> None:
        super().__init__()
        dim, inner = config.decoder_embed_dim, config.glu_dim
        self.l1, self.l2 = nn.Linear(dim, inner, bias=config.bias), nn.Linear(dim, inner, bias=config.bias)
        self.l3 = nn.Linear(inner, dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.l3(self.l1(x) * self.l2(x))
        return out


class TNLDecoderLayer(GradientCheckpointingLayer):
    """One layer: token mixer, then channel mixer, each around a residual stream."""

    def __init__(self, config: TNLConfig, layer: int) -> None:
        super().__init__()
        make = NORMS[NORM_TYPES[config.norm_type]]
        self.token_norm, self.channel_norm = (make(config.decoder_embed_dim, 1) for _ in range(2))
        self.token_mixer, self.channel_mixer = TNLLightningAttention(config, layer), TNLGLU(config)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, past_key_values: Cache | None = None
    ) -> Tensor:
        mixed = self.token_mixer(self.token_norm(hidden_states), mask, past_key_values)
        hidden_states = hidden_states + mixed
        out: Tensor = hidden_states + self.channel_mixer(self.channel_norm(hidden_states))
        return out


class TNLPreTrainedModel(PreTrainedModel):
    """What the models share: loading, saving, initial weights."""

    config: TNLConfig
    config_class = TNLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TNLDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": TNLDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Lrpe):
            heads, _, width = module.theta.shape
            init.copy_(module.theta, initial_angles(heads, width))


class TNLModel(TNLPreTrainedModel):
    """The layers, from tokens to the last norm."""

    def __init__(self, config: TNLConfig) -> None:
        super().__init__(config)
        dim = config.decoder_embed_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.layers = nn.ModuleList(TNLDecoderLayer(config, layer) for layer in range(config.decoder_layers))
        self.final_norm = NORMS[NORM_TYPES[config.norm_type]](dim, 1)
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(dim)
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
            inputs_embeds = self.embed_scale * self.embed_tokens(input_ids)
        past_key_values = state_cache(self, past_key_values, use_cache, NAME)
        mask = valid_positions(attention_mask, inputs_embeds, past_key_values, NAME)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask=mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states),
            past_key_values=past_key_values,
        )


class TNLForCausalLM(CausalReadout, TNLPreTrainedModel, GenerationMixin):
    """TransNormerLLM with its readout: loss, `generate()`, saving and loading as any model of transformers.

    Example:
        >>> sizes = dict(hidden_size=32, hidden_dim=32, intermediate_size=48)
        >>> sizes |= dict(num_hidden_layers=2, vocab_size=50)
        >>> model = TNLForCausalLM(TNLConfig(**sizes, num_attention_heads=4)).eval()
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TNLConfig) -> None:
        super().__init__(config)
        self.model = TNLModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()
