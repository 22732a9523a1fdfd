"""The recorder keeps what the model computed, of one sequence, padding left out."""

import pytest
import torch

import regard
from regard.errors import NothingObserved
from regard.report import Recorder
from tests.lens.dense import attentions
from tests.support.families import FAMILIES


def recorded(model, inputs, **options):
    with torch.no_grad(), regard.watch(model, Recorder(name="it", **options)) as seen:
        model(**inputs)
    return {kept.site: kept for kept in seen["it"]}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("sequence", [0, 1])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_all_weights(name, padding, sequence):
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model, padding)
    dense = attentions(model, inputs)
    for site, kept in recorded(model, inputs, sequence=sequence).items():
        expected = dense[site][sequence]
        assert kept.length == tuple(expected.shape[1:])
        torch.testing.assert_close(kept.exact.double(), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(kept.grid.pattern(0)[0].double(), expected, atol=1e-5, rtol=1e-4)
        assert len(kept.queries) == len(kept.keys) == kept.length[0]


def test_the_strongest_keys_where_all_are_too_many():
    model = FAMILIES["llama"].build("eager")
    inputs = FAMILIES["llama"].inputs(model, "left")
    dense = attentions(model, inputs)
    for site, kept in recorded(model, inputs, most_bytes=10, strongest=3).items():
        assert kept.exact is None
        expected = dense[site][0].topk(3, -1).values
        torch.testing.assert_close(kept.strongest[1].double(), expected, atol=1e-3, rtol=1e-3)
        there = dense[site][0].gather(2, kept.strongest[0].long())
        torch.testing.assert_close(there, expected)


def test_queries_and_keys_of_cross_attention():
    model = FAMILIES["t5"].build("eager")
    inputs = FAMILIES["t5"].inputs(model)
    found = recorded(model, inputs)
    cross = next(kept for site, kept in found.items() if site.startswith("cross"))
    assert cross.length == (inputs["decoder_input_ids"].shape[1], inputs["input_ids"].shape[1])
    assert cross.keys == inputs["input_ids"][0].tolist()
    assert cross.queries == inputs["decoder_input_ids"][0].tolist()


def test_only_the_first_forward_is_kept():
    model = FAMILIES["llama"].build("eager")
    first, second = torch.arange(5, 14)[None], torch.arange(20, 26)[None]
    with torch.no_grad(), regard.watch(model, Recorder(name="it")) as seen:
        model(first)
        model(second)
    assert {tuple(kept.keys) for kept in seen["it"]} == {tuple(range(5, 14))}


def test_nothing_is_refused():
    with pytest.raises(NothingObserved, match="no patterns"):
        Recorder().result()
