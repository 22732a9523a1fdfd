"""LightNet for text: a causal language model that decodes from a state, or one that sees both directions.

    x = MD-TPE(E[tokens])                                    x [B, T, dim]
    x = x + LightNet(norm(x));  x = x + GLU(norm(x))         each layer
    logits = norm(x) W_head

Source: Qin et al., 2024, arXiv 2405.21022. Status: the mixing agrees with flash-linear-attention's layer; the
names of parameters are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.utils.output_capturing import capture_outputs

from regard.attention.lightnet import MDTPE
from regard.errors import RegardError
from regard.models.lightnet.config import LightNetConfig
from regard.models.lightnet.parts import NAME, LightNetBlock, LightNetPreTrainedModel, check_batch
from regard.models.readout import CausalReadout
from regard.models.stateful import check_inputs, state_cache, state_layer, valid_positions
from regard.runtime.carried import StateLayer


class LightNetModel(LightNetPreTrainedModel):
    """The layers, from tokens to the last norm."""

    def __init__(self, config: LightNetConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.smooth = MDTPE(dim, config.num_attention_heads, 1, eps=config.norm_eps) if config.tpe else None
        self.layers = nn.ModuleList(
            LightNetBlock(config, layer, axes=0 if config.causal else 1)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(dim, eps=config.norm_eps)
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
            use_cache: whether to return one; a model that sees both directions has none.
        """
        check_inputs(input_ids, inputs_embeds, kwargs, NAME)
        if past_key_values is not None and not self.config.causal:
            raise RegardError(
                "a LightNet with causal=False sees both directions and cannot go on from a cache."
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        valid = valid_positions(attention_mask, x, cache, NAME)
        x = self._smoothed(x, valid, cache)
        grid = None if self.config.causal else (x.shape[1],)
        for layer in self.layers:
            x = layer(x, valid=valid, past_key_values=cache, grid=grid)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        cache = state_cache(self, given, use_cache if self.config.causal else False, NAME)
        if cache is None:
            return None
        if self.smooth is not None and len(cache.layers) == len(self.layers):
            cache.layers.append(StateLayer(NAME))
        return cache

    def _smoothed(self, x: Tensor, valid: Tensor | None, cache: Cache | None) -> Tensor:
        """MD-TPE, whose state stands in the cache after those of the layers."""
        if self.smooth is None:
            return x
        if cache is None:
            out: Tensor = self.smooth.step(x, None, valid)[0]
            return out
        place = state_layer(cache, len(self.layers), NAME)
        check_batch(place.state, x)
        out, last = self.smooth.step(x, None if place.state is None else place.state[0], valid)
        place.state, place.is_initialized = (last,), True
        place.length += x.shape[1]
        return out


class LightNetForCausalLM(CausalReadout, LightNetPreTrainedModel, GenerationMixin):
    """A causal LightNet with its readout: loss, `generate()`, saving and loading, as any model.

    Example:
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
        >>> model = LightNetForCausalLM(LightNetConfig(**sizes)).eval()
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LightNetConfig) -> None:
        if not config.causal:
            raise RegardError("causal is False; LightNetForMaskedLM sees both directions.")
        super().__init__(config)
        self.model = LightNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LightNetForMaskedLM(LightNetPreTrainedModel):
    """A LightNet that sees both directions, with its readout, to fill in masked tokens.

    Example:
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
        >>> model = LightNetForMaskedLM(LightNetConfig(**sizes, causal=False)).eval()
        >>> model(torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([1, 3, 50])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LightNetConfig) -> None:
        if config.causal:
            raise RegardError(
                "causal is True; give LightNetConfig(causal=False) for a model of both directions."
            )
        super().__init__(config)
        self.model = LightNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Return logits [B, T, vocabulary], and the loss where there are labels, -100 where none counts."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
