"""The way to the attention scores of a model: of its own attention module, or of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

from torch import Tensor, nn

from regard.errors import RegardError
from regard.objectives.adversarial.directions import LogitsOf, Scores
from regard.objectives.adversarial.port import ScorePort
from regard.runtime.edits.targets import Layer


class Reach(Protocol):
    """What an adversary needs of a model.

    Attributes:
        model: itself.
        shared: whether all that comes before the scores is computed once for all passes of a step.
    """

    model: nn.Module
    shared: bool

    def valid(self, attention_mask: Tensor) -> Scores:
        """Return which scores count, bool [B, ..., keys] a place."""
        ...

    def reader(self, **inputs: Any) -> LogitsOf:
        """Return the logits [B, classes] of a batch as a function of what is added to the scores.

        Every call has the same dropout.
        """
        ...

    def attention(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return logits [B, classes] and the weight of each token, float32 [B, T]."""
        ...

    def opened(self) -> AbstractContextManager[None]:
        """Keep the way to the scores open for the passes of a step."""
        ...


class AttendingPort:
    """Runs a model with a tensor [B, T] added to its attention scores; what comes before runs once.

    Args:
        model: with `token_states(input_ids, attention_mask)` and `attend(states, mask, added_scores)`, as
            `regard.models.attending.AttendingClassifier` has.

    Example:
        >>> import torch
        >>> from regard.models.attending import AttendingClassifier
        >>> port, ids = AttendingPort(AttendingClassifier(50)), torch.ones(3, 9, dtype=torch.int64)
        >>> mask = ids > 0
        >>> port.reader(input_ids=ids, attention_mask=mask)((torch.zeros(3, 9),)).shape
        torch.Size([3, 2])
    """

    shared = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own = cast(Any, model)

    def valid(self, attention_mask: Tensor) -> Scores:
        """Return the mask itself, bool [B, T]."""
        return (attention_mask.bool(),)

    def reader(self, **inputs: Any) -> LogitsOf:
        """Return the logits of a batch as a function of the one tensor that is added."""
        states, mask = self._own.token_states(**inputs)
        states = states.float()
        return lambda added: self._own.attend(states, mask, added[0]).logits

    def attention(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return logits [B, classes] and the weights, [B, T]."""
        out = self._own.attend(*self._own.token_states(**inputs))
        return out.logits.float(), out.token_attention

    def opened(self) -> AbstractContextManager[None]:
        """Do nothing: a function of the model takes what is added."""
        return nullcontext()


def reach(model: nn.Module, layers: Sequence[Layer] | None = None) -> Reach:
    """Return the way to the scores of a model.

    Args:
        model: with an attention module of its own (see `AttendingPort`), or of transformers.
        layers: of a model of transformers; default all of its main stack.

    Raises:
        RegardError: for layers of a model that has a single attention.
        UnsupportedModel: for a model whose attention cannot be reached.
        NoSuchSite: for a layer that is not there.
    """
    if callable(getattr(model, "token_states", None)) and callable(getattr(model, "attend", None)):
        if layers is not None:
            raise RegardError(f"{type(model).__name__} has a single attention; leave layers out.")
        return AttendingPort(model)
    return ScorePort(model, layers)
