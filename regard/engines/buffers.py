"""Memory that is used again: fresh pages cost a CPU more than much of what is computed in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Buffers:
    """One flat tensor a name, dtype and device, handed out in any shape.

    Attributes:
        reuse: whether to; False where autograd must keep what would be overwritten.
        device: of the tensors.
        store: where they are kept; give the same to several for them to share.
        least: name -> how many numbers to make room for at once, for what grows from use to use.
    """

    reuse: bool
    device: torch.device
    store: dict[Any, Tensor]
    least: Mapping[str, int] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Return a tensor that the next use of its name overwrites, of any content; None without reuse."""
        if not self.reuse:
            return None
        size, key = math.prod(shape), (name, dtype, self.device)
        if key not in self.store or self.store[key].numel() < size:
            room = max(size, self.least.get(name, 0))
            self.store[key] = torch.empty(room, dtype=dtype, device=self.device)
        return self.store[key][:size].view(shape)
