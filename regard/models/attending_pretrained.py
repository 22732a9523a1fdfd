"""The BiLSTM with attention as a model of transformers: it is saved, opened and trained like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from regard.models.attending import AttendingClassifier, Classified


class AttendingConfig(PreTrainedConfig):
    """Sizes of `AttendingModel`.

    Args:
        vocab_size: number of tokens; 0 is padding.
        dim: of the embeddings; 300 in Kitada and Iyatomi (2020).
        hidden_size: of the states, both directions together; 256 there.
        scoring: `tanh` or `dot`.
    """

    model_type = "regard_attending"

    def __init__(
        self, vocab_size: int = 2000, dim: int = 32, hidden_size: int = 64, scoring: str = "tanh",
        pad_token_id: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(pad_token_id=pad_token_id, **more)
        self.vocab_size, self.dim, self.hidden_size, self.scoring = vocab_size, dim, hidden_size, scoring


@dataclass
class AttendingOutput(ModelOutput):
    """What `AttendingModel` gives.

    Attributes:
        loss: mean cross-entropy in nats, where labels were given.
        logits: [B, classes].
        token_attention: [B, T], summing to 1 over the tokens.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_attention: Tensor | None = None


class AttendingModel(PreTrainedModel):
    """Classifies texts by attention over the states of a BiLSTM; see `attending`.

    Example:
        >>> import torch
        >>> model = AttendingModel(AttendingConfig(vocab_size=50, num_labels=3))
        >>> model(torch.ones(2, 9, dtype=torch.int64)).logits.shape
        torch.Size([2, 3])
    """

    config_class = AttendingConfig
    base_model_prefix = "body"

    def __init__(self, config: AttendingConfig) -> None:
        super().__init__(config)
        self.body = AttendingClassifier(
            config.vocab_size, config.num_labels, config.dim, config.hidden_size, config.scoring
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what torch's own modules drew."""

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.body.embed = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> AttendingOutput:
        """Return logits, and the loss of labels int64 [B]."""
        out = self.body(input_ids, attention_mask, inputs_embeds)
        loss = None if labels is None else F.cross_entropy(out.logits.float(), labels)
        return AttendingOutput(loss=loss, logits=out.logits, token_attention=out.token_attention)

    def token_states(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """See `AttendingClassifier.token_states`."""
        return self.body.token_states(*inputs, **named)

    def attend(self, states: Tensor, mask: Tensor, added_scores: Tensor | None = None) -> Classified:
        """See `AttendingClassifier.attend`."""
        return self.body.attend(states, mask, added_scores)


AutoConfig.register(AttendingConfig.model_type, AttendingConfig, exist_ok=True)
AutoModelForSequenceClassification.register(AttendingConfig, AttendingModel, exist_ok=True)
