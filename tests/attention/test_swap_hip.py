"""HiP attention swapped in: exact at full budget, in every way to generate, and with refresh."""

from dataclasses import replace

import pytest
import torch

import regard
from regard.attention import HiP
from regard.errors import RegardError, UnsupportedModel
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES

WIDE = HiP(k=64, query_block=4, window=4, sink=2, dense_layers=0, refresh=3)
NARROW = replace(WIDE, k=2, window=2, refresh=1)
BY_ROW = replace(NARROW, query_block=1, query_stride=1)
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_at_full_budget_a_model_is_as_it_was(padding):
    model = FAMILIES["llama"].build("sdpa")
    inputs = FAMILIES["llama"].inputs(model, padding)
    before = outputs(model, inputs)
    with regard.swap(model, WIDE):
        assert_same(outputs(model, inputs), before, inputs)
    with regard.swap(model, NARROW):
        assert differ(outputs(model, inputs), before)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("way", WAYS)
def test_at_full_budget_it_generates_the_same(way, padding):
    model = FAMILIES["llama"].build("sdpa")
    inputs = prompt("llama", model, padding)
    expected, scores = generated(model, inputs, **WAYS[way])
    with regard.swap(model, WIDE):
        found, others = generated(model, inputs, **WAYS[way])
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "chunked"])
def test_with_a_search_for_each_query_the_cache_changes_nothing(way):
    model = FAMILIES["llama"].build("sdpa")
    inputs = prompt("llama", model, "left")
    beams = {name: value for name, value in WAYS[way].items() if name == "num_beams"}
    with regard.swap(model, BY_ROW):
        expected, scores = generated(model, inputs, max_new_tokens=12, use_cache=False, **beams)
        found, others = generated(model, inputs, max_new_tokens=12, **WAYS[way])
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)


def test_what_was_found_follows_the_beams():
    """The best beam scores as it does when it is forced, alone, with the same searches at the same steps."""
    model = FAMILIES["llama"].build("sdpa")
    inputs = {name: x[:1] for name, x in prompt("llama", model, "none").items()}
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    with regard.swap(model, replace(BY_ROW, window=8, refresh=8)):
        beams = model.generate(**inputs, num_beams=4, length_penalty=0.0, **options)
        wanted = beams.sequences[0]

        def only(batch, ids):
            return [int(wanted[len(ids)])]

        forced = model.generate(**inputs, prefix_allowed_tokens_fn=only, **options)
    assert torch.equal(forced.sequences[0], wanted)
    steps = torch.stack(forced.logits, 1)[0].log_softmax(-1)
    total = steps.gather(1, wanted[length:, None]).sum()
    torch.testing.assert_close(total, beams.sequences_scores[0], rtol=1e-4, atol=1e-4)
    moved = beams.beam_indices[0]
    assert len(set(moved[moved >= 0].tolist())) > 1, "no beam moved, so that nothing was shown"


def test_a_refresh_makes_a_difference_and_its_window_keeps_the_newest():
    model = FAMILIES["llama"].build("sdpa")
    inputs = prompt("llama", model, "none")
    found = []
    for refresh in (1, 8):
        with regard.swap(model, replace(BY_ROW, window=8, refresh=refresh)):
            found.append(generated(model, inputs, max_new_tokens=20, eos_token_id=None)[1])
    assert differ(*found)


def test_a_kept_swap_decodes_alike(tmp_path):
    model = FAMILIES["llama"].build("sdpa")
    inputs = prompt("llama", model, "none")
    with regard.swap(model, NARROW):
        expected, _ = generated(model, inputs)
    kept = regard.swap(model, NARROW).keep()
    kept.save_pretrained(tmp_path)
    assert torch.equal(generated(type(model).from_pretrained(tmp_path), inputs)[0], expected)


def test_models_it_does_not_fit_are_refused():
    mistral = FAMILIES["mistral"].build("sdpa")
    inputs = FAMILIES["mistral"].inputs(mistral, "none")
    with pytest.raises(UnsupportedModel, match="sliding window"), regard.swap(mistral, WIDE):
        outputs(mistral, inputs)
    bert = FAMILIES["bert"].build("sdpa")
    with pytest.raises(UnsupportedModel, match="no causal order"), regard.swap(bert, WIDE):
        outputs(bert, FAMILIES["bert"].inputs(bert, "none"))
    with pytest.raises(RegardError, match="dense_layers is 3 and the model has 2 layers"):
        regard.swap(FAMILIES["llama"].build("sdpa"), HiP())
