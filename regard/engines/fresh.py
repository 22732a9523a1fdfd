"""Large new tensors without the cost of first touching them.

A process gets memory a page at a time, when it first writes there. For 32 MiB in pages of 4 KiB that takes
longer than to compute most of what is written; in huge pages, which Linux gives on request, it does not.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST, HUGE = 2**25, 2**21


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor that is about to be filled; what it holds is unspecified.

    Args:
        shape: of any number of dimensions.
        dtype: of the numbers.
        device: where a tensor of a CPU is at least LEAST bytes long and the system has huge pages, it is
            placed on such; below that the allocator reuses pages anyway.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them, or a limit on mappings
        return torch.empty(shape, dtype=dtype, device=device)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(dtype).view(shape)
