"""Bigram-backcopy and lookups: what follows a trigger, what stands in front, and what has no answer."""

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.backcopy import ROWS, SYMBOLS, backcopy
from regard.tasks.lookup import Lookup


def test_a_trigger_calls_for_the_token_before_it_and_others_do_not():
    made = backcopy(ROWS * 80)
    rows = made.corpus.train.view(ROWS, 80)
    before, here, after = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    calls = torch.isin(here, torch.tensor(made.triggers))
    assert 0.05 < calls.float().mean() < 0.6 and (after == before)[calls].all()
    assert (after == before)[~calls].float().mean() < 0.2
    assert int(rows.max()) < SYMBOLS == made.front and made.corpus.vocabulary == SYMBOLS + 1


def test_the_front_token_replaces_the_first():
    made = backcopy(ROWS * 40)
    tokens = made.corpus.train[:30].view(3, 10)
    opened = made.opened(tokens)
    assert (opened[:, 0] == made.front).all() and torch.equal(opened[:, 1:], tokens[:, 1:])
    assert int(tokens.max()) < made.front


def test_a_seed_is_a_text():
    first, same, other = (backcopy(ROWS * 40, seed) for seed in (0, 0, 1))
    assert torch.equal(first.corpus.train, same.corpus.train)
    assert not torch.equal(first.corpus.train, other.corpus.train)
    with pytest.raises(RegardError, match="length is 100"):
        backcopy(100)


def test_a_lookup_is_the_value_of_the_token_of_that_name():
    task = Lookup(length=5, width=3)
    inputs, targets, wants = task.batch(40, torch.Generator().manual_seed(0))
    assert inputs.shape == (40, 5, task.dim) and 0.3 < wants.float().mean() < 0.7
    for sequence, answers, asking in zip(inputs, targets, wants, strict=True):
        names, asked = sequence[:, :5].argmax(-1), sequence[:, 5:10].argmax(-1)
        values = {int(name): value for name, value in zip(names, sequence[:, 11:], strict=True)}
        assert sorted(values) == list(range(5)) and not values[0].any()
        for i in range(5):
            expected = values[int(asked[i])] if asking[i] else torch.zeros(3)
            assert torch.equal(answers[i], expected) and int(asked[i]) > 0
    with pytest.raises(RegardError, match="length from 2"):
        Lookup(length=1)
