"""The Trainer of transformers with adversarial attention: a mixin, and the Trainer made of it.

Mixed precision, gradient accumulation, checkpoints and `resume_from_checkpoint` are the Trainer's own.
Source: see `labelled` and `virtual`. Status: partly our choice (lambda grows over an epoch without labels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from regard.errors import RegardError
from regard.objectives.adversarial.loss import AdversarialLoss, Adversary
from regard.objectives.adversarial.virtual import AttentionVirtualAdversary
from regard.objectives.mixed_batches import MixedLoader, Padding
from regard.runtime.edits.targets import Layer


class AdversarialTrainerMixin:
    """Adds adversarial attention to a Trainer; put it before the Trainer's class.

    Args:
        adversary: `AttentionAdversary` or `AttentionVirtualAdversary`.
        unlabelled: rows with `input_ids`, which a virtual adversary alone uses; mixed into every batch.
        ratio: rows without a label for each with one.
        ramp: epochs in which lambda grows; default 1 for a virtual adversary and 0 otherwise.
        layers: of a model of transformers, whose scores are perturbed; default all.
        args, more: the Trainer's own. Rows of `train_dataset` have `input_ids` and `labels`; without a
            `data_collator` they are padded with the model's padding token.

    Raises:
        RegardError: where several devices were asked for, texts without a label come without a virtual
            adversary, or the model has a single output.

    Example:
        >>> trainer = AdversarialTrainer(                                        # doctest: +SKIP
        ...     model, TrainingArguments("out"), train_dataset=rows, adversary=AttentionAdversary(eps=1.0))
        >>> trainer.train()                                                      # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        adversary: Adversary | None,
        unlabelled: Sequence[Mapping[str, Any]] = (),
        ratio: float = 1.0,
        ramp: float | None = None,
        layers: Sequence[Layer] | None = None,
        **more: Any,
    ) -> None:
        virtual = isinstance(adversary, AttentionVirtualAdversary)
        self.unlabelled = list(unlabelled)
        if self.unlabelled and not virtual:
            raise RegardError(
                "texts without a label were given; an AttentionVirtualAdversary alone uses them."
            )
        self.adversary, self.ratio, self.layers = adversary, ratio, layers
        self.ramp = (1.0 if virtual else 0.0) if ramp is None else ramp
        self._parts: list[dict[str, float]] = []
        super().__init__(*args, **more)
        own: Any = self
        if own.args.n_gpu > 1 or own.args.world_size > 1:
            raise RegardError("adversarial attention trains on one device; start it on one.")
        if getattr(own.model.config, "num_labels", 2) < 2:
            raise RegardError("the model has one output (num_labels); a classifier needs two at least.")
        own.loss_is_scaled_for_ga = False
        own.model_accepts_loss_kwargs = False
        self.adversarial_loss = AdversarialLoss(own.model, adversary, layers)
        if more.get("data_collator") is None:
            own.data_collator = Padding(own.model.config.pad_token_id or 0)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **more: Any
    ) -> Any:
        """Return the task's loss and what the adversary adds; in evaluation the task's alone."""
        if not model.training or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **more)  # type: ignore[misc]
        own: Any = self
        with own.accelerator.autocast():
            loss, parts = self.adversarial_loss(inputs, self._share())
        self._parts.append(parts)
        return (loss, {"loss": loss}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the Trainer's own batches, or, with texts without a label, those of `MixedLoader`."""
        own: Any = self
        if not self.unlabelled:
            return super().get_train_dataloader()  # type: ignore[misc]
        loader = MixedLoader(
            own.train_dataset, self.unlabelled, self.ratio, batch=own._train_batch_size,
            pad=own.model.config.pad_token_id or 0, seed=own.args.seed,
        )  # fmt: skip
        return own.accelerator.prepare(loader)

    def log(self, logs: dict[str, float], *args: Any, **more: Any) -> None:
        """Write down the mean parts of the loss since the last time, too."""
        for name in {name for parts in self._parts for name in parts} if "loss" in logs else ():
            values = [parts[name] for parts in self._parts if name in parts]
            logs[f"adversarial_{name}"] = sum(values) / len(values)
        self._parts = [] if "loss" in logs else self._parts
        super().log(logs, *args, **more)  # type: ignore[misc]

    def _share(self) -> float:
        state = self.state  # type: ignore[attr-defined]
        steps = self.ramp * state.max_steps / max(1, state.num_train_epochs)
        return min(1.0, (state.global_step + 1) / steps) if steps > 0 else 1.0


class AdversarialTrainer(AdversarialTrainerMixin, Trainer):
    """The Trainer of transformers with adversarial attention; see `AdversarialTrainerMixin`."""
