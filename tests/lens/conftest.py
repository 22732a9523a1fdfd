"""Models and inputs for the lenses."""

import pytest
import torch

import regard
from tests.lens.dense import attentions, sequences
from tests.support.families import FAMILIES

CASES = [("llama", "none"), ("llama", "left"), ("llama", "right"), ("mistral", "left"), ("gpt-oss", "left")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def watched(request):
    """Return `see(lens) -> result` for a tiny model, its dense attentions and the real tokens."""
    family, padding = request.param
    model = FAMILIES[family].build("eager")
    inputs = FAMILIES[family].inputs(model, padding)
    inputs["input_ids"] = inputs["input_ids"] % 6 + 5
    dense = attentions(model, inputs)

    def see(lens):
        with torch.no_grad(), regard.watch(model, lens) as seen:
            model(**inputs)
        return seen[type(lens)]

    return see, dense, sequences(inputs)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")
