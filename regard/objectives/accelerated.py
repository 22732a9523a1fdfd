"""An Accelerator of its own for one training, whatever accelerate is used for beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regard.errors import RegardError


@contextmanager
def accelerated(device: str | None, precision: str, accumulate: int, caller: str) -> Iterator[Any]:
    """Yield an Accelerator: what accelerate shares in a process is put aside and back again.

    Args:
        device: such as "cpu" or "cuda:1"; None for accelerate's choice.
        precision: `no` or `bf16`.
        accumulate: pieces of a batch, by which accelerate divides each loss.
        caller: named where it is refused.

    Raises:
        RegardError: where several processes were started.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    variable = "ACCELERATE_TORCH_DEVICE"
    outside = os.environ.get(variable)
    for state in shared:
        state.clear()
    if device is not None:
        os.environ[variable] = device
    try:
        accelerator = Accelerator(
            mixed_precision=precision, gradient_accumulation_steps=accumulate, cpu=device == "cpu"
        )
        if accelerator.num_processes > 1:
            raise RegardError(
                f"{caller} was started in {accelerator.num_processes} processes; it trains in one."
            )
        yield accelerator
    finally:
        for state, kept in zip(shared, before, strict=True):
            state.clear()
            state.update(kept)
        if outside is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = outside
