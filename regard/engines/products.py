"""Batches of products of matrices, cut so that the threads of a CPU have even work.

A product of few matrices is shared out whole matrix by whole matrix: of three key heads on two threads one
thread does two. Where the rows of each are cut in two, and what they meet is repeated, both do half.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_ROWS, EVEN = 32, 0.9
Room = Callable[[tuple[int, ...], torch.dtype], Tensor | None]


class Operand:
    """Right-hand matrices [n, S, D], to be had with each one repeated; a repetition is made once.

    Args:
        x: the matrices.
        room: gives memory of a shape and dtype to repeat them in, or None for fresh memory.
    """

    def __init__(self, x: Tensor, room: Room | None = None) -> None:
        self._repeated = {1: x}
        self._room = room

    def times(self, pieces: int) -> Tensor:
        """Return [n * pieces, S, D], each matrix `pieces` times in a row."""
        if pieces not in self._repeated:
            self._repeated[pieces] = self._repeat(pieces)
        return self._repeated[pieces]

    def _repeat(self, pieces: int) -> Tensor:
        x = self._repeated[1]
        shape = (len(x), pieces, *x.shape[1:])
        out = None if self._room is None else self._room(shape, x.dtype)
        if out is None:
            return x.repeat_interleave(pieces, 0)
        return out.copy_(x[:, None].expand(shape)).flatten(0, 1)


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
