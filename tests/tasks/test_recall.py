"""Associative recall: what is asked can be answered from what was shown, and nothing else."""

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.recall import FILLER, IGNORE, Recall


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "task", [Recall(pairs=5, length=40, symbols=33), Recall(pairs=1, length=4, symbols=3)]
)
def test_every_pair_is_shown_and_asked_once(task):
    tokens, targets = task.batch(50, generator())
    assert tokens.shape == targets.shape == (50, task.length)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown = dict(zip(row[: 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
        asked = {row[i]: wanted[i] for i in range(task.length) if wanted[i] != IGNORE}
        assert asked == shown and len(shown) == task.pairs
        assert all(row[i + 1] == wanted[i] for i in range(task.length) if wanted[i] != IGNORE)
        assert all(1 <= key <= task.keys < value < task.symbols for key, value in shown.items())
        assert row.count(FILLER) == task.length - 4 * task.pairs


def test_the_same_generator_gives_the_same_and_another_other():
    task = Recall(pairs=5, length=40, symbols=33)
    one, again, other = (task.batch(4, generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_small_power_asks_early():
    early, anywhere = (Recall(pairs=2, length=200, symbols=33, power=p) for p in (0.01, 1.0))
    places = [
        (t.batch(400, generator())[1] != IGNORE).nonzero()[:, 1].double().mean() for t in (early, anywhere)
    ]
    assert places[0] < 60 and abs(places[1] - 101) < 6


def test_the_order_of_questions_tells_nothing_of_the_order_shown():
    task = Recall(pairs=2, length=60, symbols=33)
    tokens, targets = task.batch(2000, generator())
    first = (targets != IGNORE).int().argmax(1)
    same = tokens[torch.arange(2000), first] == tokens[:, 0]
    assert abs(float(same.double().mean()) - 0.5) < 0.04


def test_accuracy_counts_what_is_asked_alone():
    task = Recall(pairs=2, length=12, symbols=9)
    _, targets = task.batch(100, generator())
    right = torch.nn.functional.one_hot(targets.clamp(min=0), 9).float()
    assert task.accuracy(right, targets) == 1
    assert task.accuracy(-right, targets) == 0
    guess = torch.zeros_like(right)
    guess[..., 1 + task.keys] = 1
    assert abs(task.accuracy(guess, targets) - task.chance) < 0.1
    assert task.chance == 1 / 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"length": 39}, "10 pairs, shown and asked, need 40"),
        ({"symbols": 20}, "makes 9 keys; 10 pairs"),
        ({"power": 0}, "power is 0"),
    ],
)
def test_wrong_sizes_are_refused(change, told):
    with pytest.raises(RegardError, match=told):
        Recall(**{"pairs": 10, "length": 64, "symbols": 64, **change})
