"""Attention to the token before, against its definition."""

import numpy as np
import pytest
import torch

from regard.errors import RegardError
from regard.lens import PreviousToken
from tests.lens.dense import over_rows
from tests.lens.plant import HEAD, SITE, found_and_control


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_equals_the_dense_computation(watched, offset):
    see, dense, _ = watched
    result = see(PreviousToken(offset=offset))
    for alias, parts in dense.items():
        scores, chances = [], []
        for a in parts:
            rows = torch.arange(a.shape[1])
            back = torch.where(rows >= offset, a[:, rows, (rows - offset).clamp_min(0)], 0.0)
            sees = (rows >= offset) & (a[0, rows, (rows - offset).clamp_min(0)] > 0)
            scores.append((back, sees))
            chances.append((1 / (a > 0).any(0).sum(1).double().expand_as(back), sees))
        rows = np.array(result.sites) == alias
        np.testing.assert_allclose(result["score"][rows], over_rows(scores), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result["chance"][rows], over_rows(chances), rtol=1e-5)


def test_finds_a_planted_head(llama):
    ids = torch.arange(5, 25)[None]
    found, control = found_and_control(llama, ids, PreviousToken(), lambda i: max(0, i - 1))
    assert found.top("score", 1) == [(SITE, HEAD, 1.0)]
    assert control.at(SITE, HEAD)["score"] < 0.5


def test_refuses_to_look_ahead():
    with pytest.raises(RegardError, match="offset is 0, and must be at least 1"):
        PreviousToken(offset=0)
