"""Mask-enhanced next-token prediction in transformers' `Trainer`, with any data collator.

The callback hides inputs as they enter the model, while it trains: labels, evaluation and generation stay
clean. It knows the optimiser's step, which a collator does not (workers, prefetching), so that the ratio can
follow a ramp and a training that goes on from a checkpoint hides what it would have hidden.

Where one sequence is split over several processes (context parallelism), hide before it is split, by
`MEAPCollator`: here each process would see its shard alone. Status: our choice.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from regard.errors import RegardError
from regard.objectives.meap_objective import MEAP, check_trainable, documents_of, placeholders


class MEAPCallback(TrainerCallback):
    """Trains a model by an objective: `Trainer(..., callbacks=[MEAPCallback(MEAP(mask_id=...))])`.

    Image, video and audio placeholders that the model's config names are never hidden. Padding is told by
    `attention_mask`, packed documents by `position_ids`.

    Args:
        objective: what to hide.

    Raises:
        RegardError: as training begins, where the embedding has no row for the mask; in a step, where the
            model is fed no `input_ids`.
    """

    def __init__(self, objective: MEAP) -> None:
        if not isinstance(objective, MEAP):
            raise RegardError(f"MEAPCallback takes a MEAP, and got {type(objective).__name__}.")
        self.objective = objective
        self.step = self.part = self.process = 0
        self.hook: Any = None
        self.model: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.rows = check_trainable(model, self.objective.mask_id)
        self.kept = placeholders(model.config)
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.process, self.processes = args.process_index, args.world_size
        self._detach()
        self.hook = model.register_forward_pre_hook(self._hide, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.part = state.global_step, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    @torch.compiler.disable
    def _hide(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not model.training or not torch.is_grad_enabled():
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            raise RegardError(f"{type(model).__name__} was fed no input_ids, of which some could be hidden.")
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        hidden, _ = self.objective.hide(
            ids, step=self.step, part=self.part * self.processes + self.process, rows=self.rows,
            valid=mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else None,
            documents=documents_of(positions) if isinstance(positions, Tensor) else None,
            protect=self.kept,
        )  # fmt: skip
        self.part += 1
        return (), {**given, "input_ids": hidden}
