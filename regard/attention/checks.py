"""What functions that a user calls with tensors of their own refuse before they compute."""

from __future__ import annotations

from torch import Tensor

from regard.errors import RegardError


def refuse_nan(**given: Tensor | None) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        RegardError: naming the first, and how many of its numbers are not finite.
    """
    for name, x in given.items():
        if x is not None and not bool(x.isfinite().all()):
            count = int((~x.isfinite()).sum())
            raise RegardError(f"{name} holds {count} numbers that are NaN or infinite, of {x.numel()}.")
