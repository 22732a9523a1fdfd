"""Two small classifiers of texts: a bag of embeddings, and a BiLSTM with additive attention over its states.

    bag       logits = W mean_i e_i + b                                                   linear in e
    attending h = BiLSTM(e);  alpha = softmax_i v . tanh(U h_i + u);  logits = W sum_i alpha_i h_i + b

Both take token ids or embeddings, as `regard.lens.explanations` asks. Sources: Jain and Wallace, 2019,
arXiv 1902.10186, and Neely et al., 2022, arXiv 2205.04559 (BiLSTM with tanh attention); Bahdanau et al.,
2015, arXiv 1409.0473 (the attention). Status: partly our choice (sizes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard.errors import ShapeMismatch


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
    """Logits from the states of a BiLSTM, weighed by additive attention.

    Args:
        vocabulary: number of tokens; 0 is padding.
        classes: number of classes.
        dim: of the embeddings.
        hidden: of the states, both directions together; even.

    Example:
        >>> out = AttendingClassifier(50, 2)(torch.ones(3, 9, dtype=torch.int64))
        >>> out.logits.shape, out.token_attention.shape, out.states.shape
        (torch.Size([3, 2]), torch.Size([3, 9]), torch.Size([3, 9, 64]))
    """

    def __init__(self, vocabulary: int, classes: int = 2, dim: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.encode = nn.LSTM(dim, hidden // 2, batch_first=True, bidirectional=True)
        self.compare, self.score = nn.Linear(hidden, hidden), nn.Linear(hidden, 1, bias=False)
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
        e, mask = embedded(self.embed, input_ids, attention_mask, inputs_embeds)
        states = self._states(e, mask)
        scores = self.score(torch.tanh(self.compare(states)))[..., 0]
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return Classified(self.readout((weights[..., None] * states).sum(1)), weights, states)

    def _states(self, e: Tensor, mask: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=self.training):  # cuDNN gives no gradients in evaluation
            if bool(mask.all()):
                return self.encode(e)[0]
            lengths = mask.sum(1).cpu()
            packed = pack_padded_sequence(e, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.encode(packed)[0], batch_first=True, total_length=e.shape[1])[0]


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
