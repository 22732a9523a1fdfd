"""Pieces of equal work, and what they are multiplied by."""

import math

import pytest
import torch

from regard.engines.products import LEAST_ROWS, Operand, even_pieces

CPU = torch.device("cpu")


@pytest.fixture
def threads(monkeypatch):
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


@pytest.mark.parametrize(
    ("count", "matrices", "rows", "pieces"),
    [
        (1, 3, 384, 1),
        (2, 3, 384, 2),
        (2, 4, 384, 1),
        (2, 9, 384, 1),
        (2, 1, 384, 2),
        (2, 3, 383, 1),
        (2, 3, 2 * LEAST_ROWS - 2, 1),
        (4, 3, 384, 4),
        (8, 12, 384, 2),
    ],
)
def test_work_is_even(threads, count, matrices, rows, pieces):
    threads(count)
    assert even_pieces(matrices, rows, CPU) == pieces
    tasks = matrices * pieces
    if pieces > 1:
        assert tasks / (count * -(-tasks // count)) > matrices / (count * -(-matrices // count))


def test_a_gpu_needs_no_pieces(threads):
    threads(2)
    assert even_pieces(3, 384, torch.device("cuda")) == 1


def test_pieces_multiply_as_the_whole():
    left, memory = torch.randn(3, 8, 5), torch.empty(100 + 2 * 3 * 7 * 5)
    for room in (None, lambda shape, dtype: memory[: math.prod(shape)].view(shape)):
        _check_pieces(left, Operand(torch.randn(3, 7, 5), room))


def _check_pieces(left, right):
    whole = left @ right.times(1).transpose(1, 2)
    pieces = left.view(6, 4, 5) @ right.times(2).transpose(1, 2)
    torch.testing.assert_close(pieces.view(3, 8, 7), whole)
    assert right.times(2) is right.times(2)
