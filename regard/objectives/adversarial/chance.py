"""The same dropout in every pass of one step, so that passes differ by the perturbation alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Chance:
    """Draws for several passes: the first draws, the others draw the same again.

    Args:
        device: where passes draw.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.first: tuple[Tensor, Tensor | None] | None = None

    @contextmanager
    def same(self) -> Iterator[None]:
        """Draw what the first pass drew; what is drawn afterwards goes on as if this had not been."""
        now = self._state()
        if self.first is None:
            self.first = now
            yield
            return
        self._set(self.first)
        try:
            yield
        finally:
            self._set(now)

    def _state(self) -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), None if self.cuda is None else torch.cuda.get_rng_state(self.cuda)

    def _set(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None and self.cuda is not None:
            torch.cuda.set_rng_state(state[1], self.cuda)
