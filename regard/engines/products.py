"""Batches of products of matrices, cut so that the threads of a CPU have even work.

A product of few matrices is shared out whole matrix by whole matrix: of three key heads on two threads one
thread does two. Where the rows of each are cut in two, and what they meet is repeated, both do half.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_ROWS, EVEN = 32, 0.9


class Operand:
    """Right-hand matrices [n, S, D], to be had with each one repeated; a repetition is made once."""

    def __init__(self, x: Tensor) -> None:
        self._repeated = {1: x}

    def times(self, pieces: int) -> Tensor:
        """Return [n * pieces, S, D], each matrix `pieces` times in a row."""
        if pieces not in self._repeated:
            self._repeated[pieces] = self._repeated[1].repeat_interleave(pieces, 0)
        return self._repeated[pieces]


def even_pieces(matrices: int, rows: int, device: torch.device) -> int:
    """Return into how many pieces to cut the rows of each left-hand matrix; 1 where it would not help.

    Args:
        matrices: how many there are.
        rows: rows of each; the pieces are equal, and not made smaller than is still fast.
    """
    if device.type != "cpu":
        return 1
    threads = torch.get_num_threads()
    for pieces in range(1, 1 + min(threads, rows // LEAST_ROWS)):
        tasks = matrices * pieces
        if rows % pieces == 0 and tasks >= EVEN * threads * -(-tasks // threads):
            return pieces
    return 1
