"""Two small classifiers of texts: a bag of embeddings, and a BiLSTM with additive attention over its states.

    bag       logits = W mean_i e_i + b                                                   linear in e
    attending h = BiLSTM(e);  alpha = softmax_i v . tanh(U h_i + u);  logits = W sum_i alpha_i h_i + b

Both take token ids or embeddings, as `regard.lens.explanations` asks. Sources: Jain and Wallace, 2019,
arXiv 1902.10186, and Neely et al., 2022, arXiv 2205.04559 (BiLSTM with tanh attention); Bahdanau et al.,
2015, arXiv 1409.0473 (the attention). Status: partly our choice (sizes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard.errors import RegardError, ShapeMismatch

SCORINGS = ("tanh", "dot")


@dataclass
class Classified:
    """What a classifier of texts gives.

    Attributes:
        logits: [B, classes].
        token_attention: [B, T], summing to 1 over the tokens; None without attention.
        states: what the attention weighs, [B, T, D].
    """

    logits: Tensor
    token_attention: Tensor | None = None
    states: Tensor | None = None


class BagClassifier(nn.Module):
    """Logits from the mean of the embeddings of a text.

    Args:
        vocabulary: number of tokens; 0 is padding.
        classes: number of classes.
        dim: of the embeddings.

    Example:
        >>> BagClassifier(50, 2)(torch.ones(3, 9, dtype=torch.int64)).logits.shape
        torch.Size([3, 2])
    """

    def __init__(self, vocabulary: int, classes: int = 2, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.readout = nn.Linear(dim, classes)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Classified:
        """Return logits of token ids int64 [B, T], or of embeddings [B, T, dim] with a mask [B, T]."""
        e, mask = embedded(self.embed, input_ids, attention_mask, inputs_embeds)
        shares = mask.to(e) / mask.sum(1, keepdim=True)
        return Classified(self.readout((e * shares[..., None]).sum(1)))


class AttendingClassifier(nn.Module):
    """Logits from the states of a BiLSTM, weighed by attention.

    Args:
        vocabulary: number of tokens; 0 is padding.
        classes: number of classes.
        dim: of the embeddings.
        hidden: of the states, both directions together; even.
        scoring: `tanh`, additive as above, or `dot`, w . h_i / sqrt(hidden).

    Example:
        >>> out = AttendingClassifier(50, 2)(torch.ones(3, 9, dtype=torch.int64))
        >>> out.logits.shape, out.token_attention.shape, out.states.shape
        (torch.Size([3, 2]), torch.Size([3, 9]), torch.Size([3, 9, 64]))
    """

    def __init__(
        self, vocabulary: int, classes: int = 2, dim: int = 32, hidden: int = 64, scoring: str = "tanh"
    ) -> None:
        super().__init__()
        if scoring not in SCORINGS:
            raise RegardError(f"scoring is {scoring!r}; it must be one of {', '.join(SCORINGS)}.")
        self.embed = nn.Embedding(vocabulary, dim)
        self.encode = nn.LSTM(dim, hidden // 2, batch_first=True, bidirectional=True)
        self.compare = nn.Linear(hidden, hidden) if scoring == "tanh" else None
        self.score = nn.Linear(hidden, 1, bias=False)
        self.readout = nn.Linear(hidden, classes)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Classified:
        """Return what `Classified` says, of token ids [B, T], or of embeddings [B, T, dim] with a mask."""
        return self.attend(*self.token_states(input_ids, attention_mask, inputs_embeds))

    def token_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the attention weighs, [B, T, hidden], and which tokens are real, bool [B, T]."""
        e, mask = embedded(self.embed, input_ids, attention_mask, inputs_embeds)
        if not e.is_cuda:
            with torch.autocast(e.device.type, enabled=False):  # a CPU may have no LSTM in half precision
                e = e.to(self.embed.weight.dtype)
                return (self.encode(e)[0] if bool(mask.all()) else self._both_ways(e, mask)), mask
        with torch.backends.cudnn.flags(enabled=self.training):  # cuDNN gives no gradients in evaluation
            lengths = mask.sum(1).clamp(min=1).cpu()
            packed = pack_padded_sequence(e, lengths, batch_first=True, enforce_sorted=False)
            states = self.encode(packed)[0]
            return pad_packed_sequence(states, batch_first=True, total_length=e.shape[1])[0], mask

    def _both_ways(self, e: Tensor, mask: Tensor) -> Tensor:
        """What the LSTM makes of padded texts, one direction after the other.

        Texts are turned round within their lengths for the second. On a CPU it takes a third of the time that
        packed sequences take.
        """
        places, lengths = torch.arange(e.shape[1], device=e.device), mask.sum(1, keepdim=True)
        turned = torch.where(places < lengths, lengths - 1 - places, places)[..., None]
        weights: Any = self.encode._flat_weights
        zero = e.new_zeros(1, len(e), self.encode.hidden_size)

        def states(x: Tensor, own: Any) -> Tensor:
            return torch.lstm(x, (zero, zero), own, True, 1, 0.0, self.training, False, True)[0]

        ahead = states(e, weights[:4])
        back = states(e.gather(1, turned.expand_as(e)), weights[4:])
        return torch.cat([ahead, back.gather(1, turned.expand_as(back))], -1) * mask[..., None]

    def attend(self, states: Tensor, mask: Tensor, added_scores: Tensor | None = None) -> Classified:
        """Return what `Classified` says of states; a text without a token gets no weights at all.

        Args:
            states, mask: as `token_states` gives them.
            added_scores: added to the scores before the softmax, [B, T].
        """
        compared = states * states.shape[-1] ** -0.5 if self.compare is None else self.compare(states).tanh()
        scores = self.score(compared)[..., 0].float()
        if added_scores is not None:
            scores = scores + added_scores
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
        logits = self.readout((weights.to(states)[..., None] * states).sum(1))
        return Classified(logits, weights, states)


def embedded(
    embed: nn.Embedding, ids: Tensor | None, mask: Tensor | None, e: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, T, dim] and which tokens are real, bool [B, T]; padding stands at the end.

    Raises:
        ShapeMismatch: unless exactly one of ids [B, T] and embeddings [B, T, dim] is given.
    """
    if (ids is None) == (e is None):
        raise ShapeMismatch("give input_ids [B, T] or inputs_embeds [B, T, dim], and not both.")
    if e is None:
        assert ids is not None
        e = embed(ids)
        mask = ids != 0 if mask is None else mask
    real = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device) if mask is None else mask.bool()
    return e, real
