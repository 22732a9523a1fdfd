"""Entropy against its definition."""

import numpy as np
import torch

from regard.lens import Entropy
from tests.lens.dense import entropy, over_rows
from tests.lens.plant import HEAD, SITE, found_and_control


def test_equals_the_dense_computation(watched):
    see, dense, _ = watched
    result = see(Entropy())
    for alias, parts in dense.items():
        every = [(entropy(a), torch.ones(a.shape[1])) for a in parts]
        seen = [(a > 0).any(0).sum(1).double() for a in parts]
        some = [(e / n.clamp_min(2).log(), n > 1) for (e, _), n in zip(every, seen, strict=True)]
        rows = np.array(result.sites) == alias
        np.testing.assert_allclose(result["entropy"][rows], over_rows(every), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result["normalised"][rows], over_rows(some), rtol=1e-5, atol=1e-5)


def test_a_head_that_attends_to_one_key_has_none(llama):
    ids = torch.arange(5, 15)[None]
    found, control = found_and_control(llama, ids, Entropy(), lambda i: 0)
    assert abs(found.at(SITE, HEAD)["entropy"]) < 1e-6
    assert control.at(SITE, HEAD)["entropy"] > 0.2
    assert control.at(SITE, HEAD)["entropy"] == control.grid("entropy")[1, HEAD]
