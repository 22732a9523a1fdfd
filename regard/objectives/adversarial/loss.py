"""The loss of a step: the task's, and what an adversary adds, for any model that `reach` knows.

Rows whose label is -100 have none: they count for a virtual adversary alone. In evaluation mode the task's
loss is all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import RegardError
from regard.objectives.adversarial.labelled import AttentionAdversary
from regard.objectives.adversarial.reach import LogitsOf, reach
from regard.objectives.adversarial.virtual import AttentionVirtualAdversary
from regard.objectives.mixed_batches import UNLABELLED
from regard.runtime.edits.targets import Layer

Adversary = AttentionAdversary | AttentionVirtualAdversary


class AdversarialLoss:
    """Computes the loss of a batch.

    Args:
        model: a classifier with an attention module of its own, or of transformers.
        adversary: `AttentionAdversary`, `AttentionVirtualAdversary` or None.
        layers: of a model of transformers, whose scores are perturbed; default all.

    Raises:
        RegardError: for an adversary of another kind, or layers that are not there.

    Example:
        >>> from regard.models.attending import AttendingClassifier
        >>> model = AttendingClassifier(50)
        >>> batch = {"input_ids": torch.ones(3, 9, dtype=torch.int64), "labels": torch.tensor([0, 1, -100])}
        >>> batch["attention_mask"] = batch["input_ids"]
        >>> loss, told = AdversarialLoss(model, AttentionVirtualAdversary(eps=1.0))(batch)
        >>> sorted(told)
        ['added', 'still', 'task']
    """

    def __init__(
        self, model: nn.Module, adversary: Adversary | None, layers: Sequence[Layer] | None = None
    ) -> None:
        if adversary is not None and not isinstance(adversary, Adversary):
            raise RegardError(
                f"adversary is {type(adversary).__name__}; it must be an AttentionAdversary or an "
                "AttentionVirtualAdversary."
            )
        self.adversary, self.model = adversary, model
        self.reach = None if adversary is None else reach(model, layers)

    def __call__(self, batch: Mapping[str, Tensor], share: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, and its parts: `task`, `added` (before lambda), `still` (sequences not moved).

        Args:
            batch: `input_ids`, `attention_mask`, both [B, T], `labels` int64 [B], and what the model takes.
            share: of lambda, as it grows at the beginning of a training.
        """
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        labels = batch["labels"]
        if self.reach is None or not self.model.training or share == 0:
            task = self._task(self.model(**inputs).logits, labels)
            return task, {"task": float(task.detach())}
        assert self.adversary is not None
        adversary = replace(self.adversary, lam=share * self.adversary.lam)
        with self.reach.opened():
            if isinstance(adversary, AttentionVirtualAdversary):
                return self._virtual(adversary, inputs, labels)
            return self._labelled(adversary, inputs, labels)

    def _labelled(
        self, adversary: AttentionAdversary, inputs: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        assert self.reach is not None
        if bool((labels == UNLABELLED).any()):
            kept = labels != UNLABELLED
            inputs, labels = {name: x[kept] for name, x in inputs.items()}, labels[kept]
        logits_of, valid = self.reach.reader(**inputs), self.reach.valid(inputs["attention_mask"])
        once = not self.reach.shared and not _in_float16(labels.device)
        loss, told = adversary(
            lambda added: self._task(logits_of(added), labels), valid,
            self.model.parameters() if once else (),
        )  # fmt: skip
        return loss, {"task": float(told.clean), "added": float(told.adversarial), "still": told.still}

    def _virtual(
        self, adversary: AttentionVirtualAdversary, inputs: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        assert self.reach is not None
        valid = self.reach.valid(inputs["attention_mask"])
        logits_of: LogitsOf = self.reach.reader(**inputs)
        clean = logits_of(tuple(torch.zeros(m.shape, device=m.device) for m in valid))
        task = self._task(clean, labels)
        added, told = adversary(logits_of, valid, clean.detach())
        parts = {
            "task": float(task.detach()),
            "added": float(told.divergence.mean()),
            "still": told.still,
        }
        return task + added, parts

    @staticmethod
    def _task(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over rows with a label; 0 where none has."""
        total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
        return total / (labels != UNLABELLED).sum().clamp(min=1)


def _in_float16(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
