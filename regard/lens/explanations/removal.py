"""Does the output follow the tokens that a method ranks first? Deletion and insertion, beside random orders.

    deletion    mean over i of F(e) - F(e without the i highest tokens)             i = 1 ... n - 1
    insertion   mean over i of F(the i highest tokens alone) - F(e0)

Tokens are taken out by giving them the baseline's embedding; equal scores are ordered at random. Larger is
more faithful, and only what is gained over random orders counts. Sources: Samek et al., 2017, arXiv
1509.06321 (deletion); Petsiuk et al., 2018, arXiv 1806.07421 (both). Status: our choice of form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from regard.lens.explanations.subject import Subject

ORDERS = 5


class Faithful(NamedTuple):
    """Of one ranking of one text."""

    deletion: float
    insertion: float


def faithfulness(
    subject: Subject, scores: Mapping[str, npt.NDArray[np.float64]], *, seed: int = 0
) -> dict[str, Faithful]:
    """Return deletion and insertion of several rankings of a subject, and the mean of five random orders.

    Args:
        subject: what is explained.
        scores: name -> [n], larger = more important.
        seed: of the random orders, and of ties.

    Returns:
        name -> `Faithful`, and that of `random`.
    """
    generator = np.random.default_rng(seed)
    length = len(subject.tokens)
    orders = [np.lexsort((generator.random(length), -np.asarray(x))) for x in scores.values()]
    orders += [generator.permutation(length) for _ in range(ORDERS)]
    kept = np.stack([_highest(order) for order in orders])  # [orders, n - 1, n]: the i highest
    values = subject.values(torch.from_numpy(np.concatenate([~kept, kept]).reshape(-1, length)))
    without, alone = values.numpy().reshape(2, len(orders), length - 1).mean(-1)
    found = [
        Faithful(subject.value - w, a - subject.value_baseline) for w, a in zip(without, alone, strict=True)
    ]
    told = dict(zip(scores, found, strict=False))
    return {**told, "random": _mean(found[len(scores) :])}


def _highest(order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which tokens are among the i first of an order, bool [n - 1, n]."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[None, :] < np.arange(1, len(order))[:, None]


def _mean(found: Sequence[Faithful]) -> Faithful:
    deletion, insertion = np.mean(np.array(found), axis=0)
    return Faithful(float(deletion), float(insertion))
