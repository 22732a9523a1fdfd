"""Attention to earlier occurrences of a token, against its definition."""

import numpy as np
import torch

from regard.lens import DuplicateToken
from tests.lens.dense import matched, over_rows
from tests.lens.plant import HEAD, SITE, found_and_control


def test_equals_the_dense_computation(watched):
    see, dense, ids = watched
    result = see(DuplicateToken())
    for alias, parts in dense.items():
        rows = np.array(result.sites) == alias
        found = [matched(a, x, 0) for a, x in zip(parts, ids, strict=True)]
        np.testing.assert_allclose(
            result["score"][rows], over_rows([(m, k) for m, k, _ in found]), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            result["chance"][rows], over_rows([(c, k) for _, k, c in found]), rtol=1e-5
        )


def test_finds_a_planted_head_and_not_elsewhere(llama):
    ids = torch.arange(5, 15).repeat(2)[None]
    found, control = found_and_control(llama, ids, DuplicateToken(), lambda i: i - 10 if i >= 10 else None)
    assert found.top("score", 1) == [(SITE, HEAD, 1.0)]
    assert control.at(SITE, HEAD)["score"] < 0.5
    new = torch.arange(5, 25)[None]
    alone, _ = found_and_control(llama, new, DuplicateToken(), lambda i: i)
    assert np.isnan(alone["score"]).all()
