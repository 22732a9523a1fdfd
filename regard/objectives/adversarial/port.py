"""The way to the attention scores of a transformers model: tensors added to them, layer by layer.

scores'_l = scores_l + r_l          r_l [B, H, T, S], gradients reach it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.engines.rows import RowBlock
from regard.errors import RegardError
from regard.objectives.adversarial.chance import Chance
from regard.objectives.adversarial.directions import LogitsOf, Scores
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.edits.targets import Layer
from regard.runtime.protocol import EVERYTHING, Edit, Lens, Wanted
from regard.runtime.verbs import steer, watch

if TYPE_CHECKING:
    from regard.runtime.call import Call


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedScores(Edit):
    """Add a tensor [B, H, T, S] to the scores of each of some layers; padding left out."""

    added: Mapping[str, Tensor]

    def wants(self, call: Call) -> Wanted | None:
        return EVERYTHING if call.site.alias in self.added else None

    def scores(self, block: RowBlock) -> Tensor:
        part = self.added[block.site.alias]
        return block.scores + part[:, :, block.start : block.stop, block.key_start : block.key_stop]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weights(Lens):
    """Keeps the weights of one layer, heads meant, of the row that the answer is read from; [B, T]."""

    alias: str
    rows: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)

    def wants(self, call: Call) -> Wanted | None:
        return EVERYTHING if call.site.alias == self.alias else None

    def weights(self, block: RowBlock) -> None:
        weights = block.weights.float().mean(1)
        inside = (self.rows >= block.start) & (self.rows < block.stop)
        at = (self.rows - block.start).clamp(0, block.stop - block.start - 1)
        found = weights[torch.arange(len(at), device=at.device), at] * inside[:, None]
        self.kept["weights"] = self.kept["weights"] + found if "weights" in self.kept else found

    def result(self) -> Tensor:
        return self.kept["weights"]


class ScorePort:
    """Runs a model with tensors added to its attention scores.

    Args:
        model: of transformers, in whose attention every layer sees the same tokens; such as an encoder for
            classification.
        layers: numbers in the main stack, or aliases; default all of it.

    Raises:
        NoSuchSite: for a layer that is not there.
        UnsupportedModel: for a model without attention that can be reached.

    Example:
        >>> port = ScorePort(model)                                             # doctest: +SKIP
        >>> loss, told = AttentionAdversary(eps=1.0)(                           # doctest: +SKIP
        ...     lambda added: port(added, **batch).loss, port.valid(batch["attention_mask"]))
    """

    shared = False

    def __init__(self, model: nn.Module, layers: Sequence[Layer] | None = None) -> None:
        self.model = root_of(model)
        anatomy = anatomy_of(self.model)
        require_attention(anatomy)
        main = [site for site in anatomy.sites if site.kind == anatomy.main]
        self.sites = main if layers is None else [anatomy.site(layer) for layer in layers]
        model_type: Any = self.model
        self.causal = bool(getattr(model_type.config, "is_decoder", False) or model_type.can_generate())
        if not self.sites:
            raise RegardError("layers is empty; leave it out to mean all of them.")
        self._given: dict[str, Tensor] = {}
        self._open = False

    def valid(self, attention_mask: Tensor) -> Scores:
        """Return which scores count in each layer, bool [B, H, T, T].

        Args:
            attention_mask: [B, T], 1 at real tokens.
        """
        real = attention_mask.bool()
        pairs = real[:, :, None] & real[:, None, :]
        if self.causal:
            pairs = pairs & torch.ones_like(pairs[0]).tril()
        return tuple(pairs[:, None].expand(-1, site.heads or 1, -1, -1) for site in self.sites)

    def __call__(self, added: Scores, **inputs: Any) -> Any:
        """Return the model's output with a tensor added to the scores of each layer."""
        with self.opened():
            self._given.update({site.alias: x for site, x in zip(self.sites, added, strict=True)})
            return self.model(**inputs)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the way to the scores open for several passes, rather than open it for each.

        Until the block ends, passes of the model that do not come through here have the last tensors added.
        """
        if self._open:
            yield
            return
        with steer(self.model, AddedScores(added=self._given)):
            self._open = True
            try:
                yield
            finally:
                self._open = False
                self._given.clear()

    def reader(self, **inputs: Any) -> LogitsOf:
        """Return logits [B, classes] as a function of what is added; every call has the same dropout."""
        chance = Chance(next(self.model.parameters()).device)

        def logits(added: Scores) -> Tensor:
            with chance.same():
                return self(added, **inputs).logits

        return logits

    def attention(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Return logits [B, classes] and weights float32 [B, T]: of the last layer reached, heads meant.

        They are of the row that answers: the first token, or the last real one of a causal model. Status:
        our choice.
        """
        mask = inputs["attention_mask"].bool()
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
        lens = _Weights(alias=self.sites[-1].alias, rows=last if self.causal else torch.zeros_like(last))
        with watch(self.model, lens):
            logits = self.model(**inputs).logits
        return logits.float(), lens.result() * mask
