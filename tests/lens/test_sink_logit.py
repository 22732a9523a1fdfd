"""Sink logits against their definition: the log of dense attention is the scores up to a shift of rows."""

import numpy as np
import pytest
import torch

import regard
from regard.errors import RegardError
from regard.lens import SinkLogit
from regard.runtime import Edit
from tests.support.families import FAMILIES


@pytest.mark.parametrize("place", [0, 2])
def test_equals_the_dense_computation(watched, place):
    see, dense, _ = watched
    result = see(SinkLogit(position=place))
    for alias, parts in dense.items():
        deltas, plain = [], []
        for a in parts:
            for i in range(place + 1, a.shape[1]):
                seen = a[0, i] > 0
                if not seen[place]:
                    continue
                scores = a[:, i].log()
                seen[place] = False
                others = scores[:, seen]
                deltas.append(scores[:, place] - others.mean(1))
                plain.append(others - others.mean(1, keepdim=True))
        rows = np.array(result.sites) == alias
        delta = torch.stack(deltas)
        np.testing.assert_allclose(result["delta"][rows], delta.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result["spread"][rows], delta.std(0, False), rtol=1e-4, atol=1e-5)
        apart = torch.cat(plain, 1).square().mean(1).sqrt()
        np.testing.assert_allclose(result["plain"][rows], apart, rtol=1e-4, atol=1e-5)


def test_a_planted_level_sink_is_found_and_nothing_without_it():
    model, ids = FAMILIES["llama"].build("sdpa"), torch.arange(5, 25)[None]

    class Planted(Edit):
        def scores(self, block):
            first = block.key_positions[:, None, None, :] == 0
            return torch.where(
                first & (block.scores > -1e4), torch.full_like(block.scores, 9.0), block.scores
            )

    with torch.no_grad(), regard.steer(model, Planted(), SinkLogit()) as planted:
        model(input_ids=ids)
    with torch.no_grad(), regard.watch(model, SinkLogit()) as plain:
        model(input_ids=ids)
    assert planted[SinkLogit]["delta"].min() > 4 > plain[SinkLogit]["delta"].max()
    (found,) = SinkLogit.findings(planted[SinkLogit])
    assert found.text.startswith("In 8 heads the first token's score stands over 1 above")


def test_refuses_what_is_no_position():
    with pytest.raises(RegardError, match=r"position is -1; it is counted from the first real token"):
        SinkLogit(position=-1)
