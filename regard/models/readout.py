"""What causal language models with a state share: from the residual stream to logits and the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


class CausalReadout:
    """The forward of a model with `model`, from tokens to the last norm, and `lm_head`; name it first."""

    model: Any
    lm_head: Any
    config: Any
    loss_function: Any
    training: bool

    def auxiliary(self) -> Tensor | None:
        """Return what the last forward in training adds to the loss of labels; None for nothing."""
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, vocabulary], and the loss where there are labels.

        Args: as for the model below the readout, and
            labels: int64 [B, T], -100 where none counts; shifted here.
            logits_to_keep: of how many last positions, or of which, logits are computed; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            added = self.auxiliary() if self.training else None
            loss = loss if added is None else loss + added
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )  # fmt: skip
