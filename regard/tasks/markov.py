"""Symbols of a random Markov chain of second order: the next depends on the last two, and on their order.

    P(x_t | x_{t-1}, x_{t-2}) = row (x_{t-2}, x_{t-1}) of a table, rows drawn from a Dirichlet distribution

A model that cannot tell the last symbol from the one before it, or from earlier ones, cannot predict it.
Whatever is further back is of no use, so how well a model does at lengths it was not trained on shows what it
does with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.tasks.corpus import Corpus


def markov(
    *,
    symbols: int = 32,
    length: int = 200_000,
    held_out: int = 20_000,
    sharpness: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Return a text of symbols, a part to train on and a part held out, from one table.

    Args:
        symbols: how many there are, from 2.
        length, held_out: symbols in each part.
        sharpness: of the Dirichlet distribution; the smaller, the surer the next symbol.
        seed: of the table and of what is drawn from it.

    Example:
        >>> data = markov(symbols=8, length=50, held_out=20)
        >>> data.vocabulary, len(data.train), int(data.train.max()) < 8
        (8, 50, True)
    """
    for name, value, least in (("symbols", symbols, 2), ("length", length, 1), ("held_out", held_out, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")
    if not sharpness > 0:
        raise RegardError(f"sharpness is {sharpness}; it must be above 0.")
    table, uniform = _drawn(symbols, length + held_out, sharpness, seed)
    bounds = table.cumsum(-1).clamp(max=1.0)
    bounds[..., -1] = 1.0
    rows, draws, found, before = bounds.tolist(), uniform.tolist(), [], (0, 0)
    for draw in draws:
        row = rows[before[0]][before[1]]
        new = next(i for i, bound in enumerate(row) if draw <= bound)
        before = (before[1], new)
        found.append(new)
    return Corpus(torch.tensor(found[:length]), torch.tensor(found[length:]), symbols)


def entropy_rate(data: Corpus, symbols: int, sharpness: float = 0.05, seed: int = 0) -> float:
    """Return the loss in nats of who knows the table, on the held-out part of what `markov` gave.

    Example:
        >>> data = markov(symbols=8, length=50, held_out=2000)
        >>> 0 < entropy_rate(data, 8) < 1
        True
    """
    table, _ = _drawn(symbols, len(data.train) + len(data.held_out), sharpness, seed)
    x = data.held_out
    return float(-table[x[:-2], x[1:-1], x[2:]].log().mean())


def _drawn(symbols: int, length: int, sharpness: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (symbols, symbols, symbols)
    gamma = torch._standard_gamma(torch.full(shape, sharpness, dtype=torch.float64), generator=generator)
    table = gamma.clamp(min=1e-300)
    uniform = torch.rand(length, generator=generator, dtype=torch.float64)
    return table / table.sum(-1, keepdim=True), uniform
