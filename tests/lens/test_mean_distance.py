"""Mean distance against its definition."""

import numpy as np
import torch

import regard
from regard.lens import MeanDistance
from tests.lens.dense import distance
from tests.lens.plant import HEAD, SITE, found_and_control
from tests.support.families import FAMILIES


def test_equals_the_dense_computation(watched):
    see, dense, _ = watched
    result = see(MeanDistance())
    for alias, parts in dense.items():
        expected = sum(distance(a).sum(1) for a in parts) / sum(a.sum((1, 2)) for a in parts)
        rows = np.array(result.sites) == alias
        np.testing.assert_allclose(result["distance"][rows], expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_looks_both_ways():
    model = FAMILIES["bert"].build("eager")
    inputs = FAMILIES["bert"].inputs(model)
    with torch.no_grad():
        dense = model(**inputs, output_attentions=True).attentions
        with regard.watch(model, MeanDistance()) as seen:
            model(**inputs)
    expected = torch.stack([torch.stack([distance(x.double()).mean(1) for x in a]).mean(0) for a in dense])
    np.testing.assert_allclose(seen[MeanDistance].grid("distance"), expected, rtol=1e-5)


def test_finds_a_head_that_looks_three_back(llama):
    ids = torch.arange(5, 25)[None]
    found, control = found_and_control(llama, ids, MeanDistance(), lambda i: max(0, i - 3))
    assert abs(found.at(SITE, HEAD)["distance"] - (0 + 1 + 2 + 17 * 3) / 20) < 1e-5
    assert abs(control.at(SITE, HEAD)["distance"] - 3) > 0.5
