"""Softmax swapped in changes nothing: in every family, at every kind of site, in every way of generating."""

import pytest
import torch

import regard
from regard.attention import Softmax
from tests.attention.models import assert_same, generated, outputs, prompt
from tests.support.families import FAMILIES

PADDINGS = [
    pytest.param(name, padding, id=f"{name}-{padding}")
    for name, family in FAMILIES.items()
    for padding in (("none", "left", "right") if family.pads else ("none",))
]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}


def everywhere(model):
    return regard.swap(model, Softmax(), layers=[s.alias for s in regard.watch(model).sites])


@pytest.mark.parametrize(("name", "padding"), PADDINGS)
def test_forward(name, padding):
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model, padding)
    expected = outputs(model, inputs)
    with everywhere(model) as swapped:
        found = outputs(model, inputs)
    assert set(swapped.called) == {site.alias for site in swapped.sites} and swapped.silent == []
    assert_same(found, expected, inputs)
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, id=f"{name}-{way}")
        for name, family in FAMILIES.items()
        for way in WAYS
        if family.generative and not (way == "static" and not family.static)
    ],
)
def test_generate(name, way):
    """Mistral, Gemma and gpt-oss have a sliding cache here: the prompt is longer than their window."""
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    expected, _ = generated(model, inputs, **WAYS[way])
    with everywhere(model):
        found, _ = generated(model, inputs, **WAYS[way])
    assert torch.equal(found, expected)
