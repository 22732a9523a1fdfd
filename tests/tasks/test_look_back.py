"""Looking back: answers are the symbols that stood there, and wrong sizes are refused."""

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.look_back import LookBack


def test_answers_are_the_symbols_that_stood_there():
    task = LookBack(symbols=5, tasks=3, length=9)
    text = task.batch(16, torch.Generator().manual_seed(0))
    assert all(part.shape == (16, 9) for part in text)
    assert set(text.tasks.unique().tolist()) == {0, 1, 2} and text.symbols.max() == 4
    for row in range(16):
        for at in range(9):
            place = at - 1 - int(text.tasks[row, at])
            assert text.answers[row, at] == (text.symbols[row, place] if place >= 0 else -100)


def test_the_same_seed_gives_the_same_text():
    one, two, other = (LookBack().batch(2, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.symbols, other.symbols)


@pytest.mark.parametrize(("name", "value"), [("symbols", 1), ("tasks", 0), ("length", 1), ("length", 2.0)])
def test_wrong_sizes_are_refused(name, value):
    with pytest.raises(RegardError, match=f"{name} is {value}; it must be a whole number from"):
        LookBack(**{name: value})
