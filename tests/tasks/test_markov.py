"""The chain follows its table, and its entropy rate is what a model can at best reach."""

import math

import pytest
import torch

from regard.errors import RegardError
from regard.tasks.markov import entropy_rate, markov


def test_the_next_symbol_depends_on_the_last_two():
    data = markov(symbols=4, length=60_000, held_out=5_000, seed=3)
    x = data.train
    pairs = x[:-2] * 4 + x[1:-1]

    def loss(contexts):
        """Of the frequencies of what follows a context."""
        counts = torch.zeros(int(contexts.max()) + 1, 4).index_put_(
            (contexts, x[2:]), torch.ones(len(contexts)), accumulate=True
        )
        shares = counts / counts.sum(-1, keepdim=True)
        return float(-shares[contexts, x[2:]].log().mean())

    assert abs(loss(pairs) - entropy_rate(data, 4, seed=3)) < 0.03
    assert loss(x[1:-1]) > loss(pairs) + 0.05
    assert loss(pairs) < 0.7 * math.log(4)


def test_a_seed_gives_the_same_text_and_another_another():
    one, same, other = (markov(symbols=6, length=200, held_out=50, seed=seed) for seed in (0, 0, 1))
    assert one.digest() == same.digest() != other.digest()
    assert one.train.min() >= 0 and one.train.max() < 6 and len(one.held_out) == 50


@pytest.mark.parametrize("options", [{"symbols": 1}, {"length": 0}, {"held_out": 1.5}, {"sharpness": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(RegardError, match=next(iter(options))):
        markov(**options)
