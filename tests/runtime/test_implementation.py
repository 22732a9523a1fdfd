"""The implementation `regard` outside of sessions, and what is saved, copied or kept while one is open."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import regard
from regard.runtime import Point
from tests.support.families import FAMILIES
from tests.support.stages import Rows, Sharper, run, state


@pytest.fixture
def llama():
    return FAMILIES["llama"].build("sdpa")


@pytest.fixture
def saved(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("how", ["from_pretrained", "set_attn_implementation"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_regard_as_an_attention_implementation(saved, how, padding):
    eager = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager").eval()
    if how == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="regard").eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(saved).eval()
        model.set_attn_implementation("regard")
    inputs = FAMILIES["llama"].inputs(model, padding)
    keep = inputs.get("attention_mask", torch.ones(2, 9)).bool()
    before = state(model)
    with torch.no_grad():
        expected, found = eager(**inputs).logits, model(**inputs).logits
        with regard.watch(model, Rows()) as seen:
            watched = model(**inputs).logits
    assert seen[Rows] == {"text.0": 1, "text.1": 1}
    assert torch.allclose(found[keep], expected[keep], atol=1e-5)
    assert torch.allclose(watched[keep], expected[keep], atol=1e-5)
    assert state(model) == before
    assert model.config._attn_implementation == "regard"
    options = {"max_new_tokens": 4, "do_sample": False}
    if padding != "right":
        assert torch.equal(model.generate(**inputs, **options), eager.generate(**inputs, **options))


def test_a_config_saved_inside_a_session_loads_as_before(llama, tmp_path):
    with regard.watch(llama, Rows()):
        run(llama)
        llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    assert torch.allclose(run(again), run(llama), atol=1e-6)


def test_a_copy_made_inside_a_session_is_its_own_model(llama):
    plain = run(llama)
    with regard.steer(llama, Sharper()):
        twin, read = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
        edited = run(llama)
        assert torch.allclose(run(twin), plain, atol=1e-5)
    assert torch.allclose(run(twin), plain, atol=1e-5)
    assert torch.allclose(run(read), plain, atol=1e-5)
    assert not torch.allclose(edited, plain, atol=1e-3)


def test_a_copy_is_not_patched(llama):
    plain = run(llama)
    values = {Point("residual", 0): lambda x: 0 * x, Point("residual_pre", 1): lambda x: x + 1}
    with regard.patch(llama, values):
        twin = copy.deepcopy(llama)
        assert torch.allclose(run(twin), plain, atol=1e-5)
        run(llama)
    assert torch.allclose(run(twin), plain, atol=1e-5)


def filled(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**FAMILIES["llama"].inputs(model), past_key_values=cache)
    return cache


def test_a_cache_is_left_as_it_was(llama):
    names = set(vars(filled(llama)))
    with regard.watch(llama, Rows()):
        cache = filled(llama)
    assert set(vars(cache)) == names
    pickle.dumps(cache)


def test_a_copied_cache_follows_its_own_beams(llama):
    plain = copy.deepcopy(filled(llama))
    with regard.watch(llama, Rows()):
        cache = filled(llama)
        twin = copy.deepcopy(cache)
        kept = cache.layers[0].keys.clone()
        index = torch.tensor([1, 1])
        twin.reorder_cache(index)
        plain.reorder_cache(index)
    assert torch.equal(cache.layers[0].keys, kept)
    assert torch.allclose(twin.layers[0].keys, plain.layers[0].keys)
