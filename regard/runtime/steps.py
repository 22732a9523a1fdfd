"""Tells stages each token that `generate()` chooses, and counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.runtime.protocol import defines

if TYPE_CHECKING:
    from regard.runtime.attachment import Attachment

BEAM_CHOICE = "_get_running_beams_for_next_iteration"


class Steps:
    """A stopping criterion that never stops. `generate()` calls it with every token chosen.

    Beam search calls it with more candidates than beams, before it knows which beams go on; those are
    taken from `beams`, which stands around that choice, and told once the caches have been reordered.

    Args:
        attachment: whose stages are told.
        prompt: token ids [B, S] that those chosen are appended to; without, the first call is of one token.
    """

    def __init__(self, attachment: Attachment, prompt: Any = None) -> None:
        self.attachment = attachment
        self.count = 0
        self.told = any(defines(stage, "step") for stage in attachment.stages)
        self.width = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.ndim == 2 else 0
        self.waiting: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        run = self.attachment.last_run
        first = self.width or input_ids.shape[1] - 1
        self.count += 1
        self.width = input_ids.shape[1]
        if run is not None and input_ids.shape[0] == run.batch:
            for column in range(first, self.width):
                self._tell(input_ids[:, column])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def beams(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Choose the beams that go on, and keep their tokens; the first result is [B, beams, S].

        Where none may go on, `generate()` does not mind which are chosen: those that it returns from are.
        """
        ended = kwargs.get("next_token_hits_stopping_criteria")
        if ended is not None and bool(ended.all()):
            late = torch.arange(ended.shape[1], device=ended.device) >= kwargs["num_beams"]
            kwargs["next_token_hits_stopping_criteria"] = late.expand_as(ended)
        chosen = original(*args, **kwargs)
        self.waiting = chosen[0][..., self.width - 1].flatten()
        return chosen

    def settle(self) -> None:
        """Tell the tokens of the beams that went on, if there are any."""
        tokens, self.waiting = self.waiting, None
        if tokens is not None:
            self._tell(tokens)

    def _tell(self, tokens: Tensor) -> None:
        run = self.attachment.last_run
        for stage in self.attachment.stages:
            if defines(stage, "step"):
                stage.step(run, tokens)  # type: ignore[attr-defined]
