"""Swaps that stay: saved, loaded in a fresh process, copied, undone, and used together with sessions."""

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AutoModelForCausalLM

import regard
from regard.attention import MECHANISMS, LinearAttention, SlidingWindow, Softmax, Spec, mechanism
from regard.attention.softmax import SoftmaxAttention
from regard.errors import RegardError, UnsupportedModel
from regard.runtime.carried import _CARRIERS, StateLayer
from regard.runtime.permanent import _KEPT
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES
from tests.support.stages import Rows, Sharper

SPECS = [SlidingWindow(3), LinearAttention()]


@pytest.fixture
def llama():
    return FAMILIES["llama"].build("sdpa")


@pytest.fixture
def inputs(llama):
    return FAMILIES["llama"].inputs(llama, "left")


def swapped(model, spec, inputs, layers=None):
    with regard.swap(model, spec, layers):
        return outputs(model, inputs)


@pytest.mark.parametrize("spec", SPECS)
def test_a_kept_swap_computes_what_the_session_does(llama, inputs, spec):
    text = prompt("llama", llama)
    expected = swapped(llama, spec, inputs)
    with regard.swap(llama, spec):
        tokens, _ = generated(llama, text, num_beams=2)
    kept = regard.swap(llama, spec).keep()
    assert kept is llama
    assert torch.equal(outputs(kept, inputs), expected)
    assert torch.equal(generated(kept, text, num_beams=2)[0], tokens)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("spec", SPECS)
def test_saving_and_loading(llama, inputs, spec, layers, tmp_path):
    expected = swapped(llama, spec, inputs, layers)
    regard.swap(llama, spec, layers).keep().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(outputs(loaded, inputs), expected, inputs)
    text = prompt("llama", llama)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(generated(again, text)[0], generated(llama, text)[0])
    loaded.save_pretrained(tmp_path / "twice")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
    assert_same(outputs(third, inputs), expected, inputs)


def test_a_loaded_state_is_carried_from_the_second_forward_on(llama, tmp_path):
    regard.swap(llama, LinearAttention()).keep().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = FAMILIES["llama"].inputs(llama)["input_ids"]
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
        cache = loaded(input_ids=ids[:, :5]).past_key_values
        found = loaded(input_ids=ids[:, 5:], past_key_values=cache).logits
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    torch.testing.assert_close(found, expected[:, 5:], rtol=1e-4, atol=1e-5)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as refusal:
    print(refusal)
import regard
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_a_fresh_process(llama, inputs, tmp_path):
    """Without regard loading fails, saying what is missing; once it is imported, the logits are the same."""
    ids = inputs["input_ids"]
    expected = swapped(llama, SlidingWindow(3), {"input_ids": ids})
    regard.swap(llama, SlidingWindow(3)).keep().save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    files = [str(tmp_path / name) for name in ("model", "ids.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'attn_implementation="regard"` is not supported' in done.stdout
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_what_the_config_says(llama, tmp_path):
    regard.swap(llama, SlidingWindow(3), layers=[1]).keep().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = {"class": "LlamaAttention", "layer_idx": 1, "is_causal": True}
    assert config["regard"] == {
        "before": "sdpa", "swap": [{**entry, "mechanism": "sliding-window", "window": 3}],
    }  # fmt: skip
    assert config["attn_implementation"] == "regard"


def test_loading_without_the_swap(llama, inputs, tmp_path):
    plain = outputs(llama, inputs)
    regard.swap(llama, SlidingWindow(2)).keep().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert_same(outputs(loaded, inputs), plain, inputs)
    with regard.watch(loaded, Rows()):
        assert_same(outputs(loaded, inputs), plain, inputs)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("loaded", [False, True])
def test_undoing(llama, inputs, spec, loaded, tmp_path):
    text = prompt("llama", llama)
    plain, tokens = outputs(llama, inputs), generated(llama, text)[0]
    model = regard.swap(llama, spec).keep()
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert differ(outputs(model, inputs), plain)
    assert regard.unswap(model) is model
    assert model.config._attn_implementation == "sdpa" and "regard" not in model.config.to_dict()
    assert "attn_implementation" not in model.config.to_dict()
    assert_same(outputs(model, inputs), plain, inputs)
    assert torch.equal(generated(model, text)[0], tokens)
    with regard.watch(model, Rows()):
        assert_same(outputs(model, inputs), plain, inputs)
    model.save_pretrained(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config._attn_implementation == "sdpa"
    assert not _CARRIERS.get(model.model.layers[0].self_attn)
    with pytest.raises(RegardError, match="no kept swap"):
        regard.unswap(model)


def test_switching_off_and_on(llama, inputs):
    text = prompt("llama", llama)
    plain, tokens = outputs(llama, inputs), generated(llama, text)[0]
    kept = regard.swap(llama, LinearAttention()).keep()
    expected = generated(kept, text)[0]
    kept.set_attn_implementation("sdpa")
    assert_same(outputs(kept, inputs), plain, inputs)
    assert torch.equal(generated(kept, text)[0], tokens)
    with regard.watch(kept, Rows()):
        assert torch.equal(generated(kept, text)[0], tokens)
    kept.set_attn_implementation("regard")
    assert torch.equal(generated(kept, text)[0], expected)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies(llama, inputs, spec, how):
    text = prompt("llama", llama)
    plain = outputs(llama, inputs)
    kept = regard.swap(llama, spec).keep()
    expected, tokens = outputs(kept, inputs), generated(kept, text, num_beams=2)[0]
    twin = how(kept)
    assert torch.equal(outputs(twin, inputs), expected)
    assert torch.equal(generated(twin, text, num_beams=2)[0], tokens)
    regard.unswap(kept)
    assert torch.equal(outputs(twin, inputs), expected)
    regard.unswap(twin)
    assert_same(outputs(twin, inputs), plain, inputs)


@pytest.mark.parametrize("spec", SPECS)
def test_sessions_on_a_kept_model(llama, inputs, spec):
    text = prompt("llama", llama)
    kept = regard.swap(llama, spec).keep()
    plain, tokens = outputs(kept, inputs), generated(kept, text)[0]
    once = {**inputs, "use_cache": False}
    with regard.watch(kept, Rows()) as seen:
        assert torch.equal(outputs(kept, inputs), plain)
        weights = seen.weights(0, 1)
    assert set(seen[Rows]) == {"text.0", "text.1"}
    with regard.swap(kept, spec), regard.watch(kept, Rows()) as other:
        outputs(kept, once)
        assert torch.allclose(other.weights(0, 1), weights, atol=1e-6)
    with regard.swap(kept, Softmax()):
        assert differ(outputs(kept, once), plain)
        softmax = generated(kept, text)[0]
    assert kept.config._attn_implementation == "regard"
    assert torch.equal(generated(kept, text)[0], tokens)
    regard.unswap(kept)
    assert torch.equal(generated(kept, text)[0], softmax)


def test_steering_a_kept_model(llama, inputs):
    kept = regard.swap(llama, SlidingWindow(3), layers=[1]).keep()
    plain = outputs(kept, inputs)
    with (
        regard.steer(kept, Sharper()),
        pytest.raises(RegardError, match="Sharper changes scores, and text.1"),
    ):
        outputs(kept, inputs)
    assert torch.equal(outputs(kept, inputs), plain)


def test_swaps_of_different_layers_add_up_and_the_last_of_one_counts(llama, inputs, tmp_path):
    kept = regard.swap(llama, SlidingWindow(3), layers=[0]).keep()
    kept = regard.swap(kept, LinearAttention(), layers=[1]).keep()
    first = outputs(kept, inputs)
    kept = regard.swap(kept, SlidingWindow(1), layers=[1]).keep()
    second = outputs(kept, inputs)
    kept.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(outputs(loaded, inputs), second, inputs)
    assert differ(first, second)
    regard.unswap(kept)
    with regard.swap(kept, SlidingWindow(3), layers=[0]), regard.swap(kept, LinearAttention(), layers=[1]):
        assert torch.equal(outputs(kept, inputs), first)


PARTS = [
    ("llava", None), ("llava", ["vision.0", "vision.1"]), ("bart", None), ("bart", ["cross.1", "encoder.0"]),
    ("t5", ["decoder.0"]), ("t5", ["encoder.1", "cross.0"]),
    ("whisper", ["decoder.1", "encoder.0", "encoder.1"]),
    ("vit", None), ("clip", None), ("gemma3-images", [0]), ("qwen2-vl", None), ("modernbert", [1]),
    ("gpt-oss", [0]), ("deepseek", [1]), ("opt", [0]), ("swin", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layers"), PARTS)
def test_models_of_several_parts(name, layers, tmp_path):
    how = "eager" if name == "gpt-oss" else "sdpa"
    model = FAMILIES[name].build(how)
    inputs = FAMILIES[name].inputs(model, "none")
    plain, spec = outputs(model, inputs), SlidingWindow(1)
    expected = swapped(model, spec, inputs, layers)
    regard.swap(model, spec, layers).keep().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_same(outputs(loaded, inputs), expected, inputs)
    regard.unswap(loaded)
    assert_same(outputs(loaded, inputs), plain, inputs)
    assert differ(plain, expected)
    configs = {id(m.config): m.config for m in loaded.modules() if hasattr(m, "config")}
    assert {c._attn_implementation for c in configs.values()} == {how}


def test_layers_that_cannot_be_told_apart_are_refused():
    vit = FAMILIES["vit"].build("sdpa")
    with pytest.raises(UnsupportedModel, match="vision.0 and vision.1|vision.1 and vision.0"):
        regard.swap(vit, SlidingWindow(3), layers=[0]).keep()
    assert vit.config._attn_implementation == "sdpa" and vit.config.regard is None


def test_a_model_that_calls_sdpa_itself_is_refused():
    with pytest.raises(UnsupportedModel, match=r"text\.0 calls scaled_dot_product_attention itself"):
        regard.swap(FAMILIES["falcon"].build(), SlidingWindow(3)).keep()


def test_parameters_are_refused(llama):
    class WithParameter(SoftmaxAttention):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    before = dict(MECHANISMS)
    try:
        kind = type("Learned", (Spec,), {"module": WithParameter, "__annotations__": {"module": ClassVar}})
        with pytest.raises(UnsupportedModel, match="has parameters"):
            regard.swap(llama, mechanism("learned")(dataclass(frozen=True)(kind))()).keep()
    finally:
        MECHANISMS.clear()
        MECHANISMS.update(before)


def test_not_while_a_session_is_open(llama, inputs):
    session = regard.swap(llama, SlidingWindow(3))
    with regard.watch(llama, Rows()):
        outputs(llama, inputs)
        with pytest.raises(RegardError, match="keep\\(\\) was called while a session is open"):
            session.keep()
    kept = session.keep()
    with regard.watch(kept, Rows()):
        outputs(kept, inputs)
        with pytest.raises(RegardError, match="unswap was called while a session is open"):
            regard.unswap(kept)


def test_a_config_that_names_an_unknown_mechanism_is_refused_every_time(llama, inputs, tmp_path):
    regard.swap(llama, SlidingWindow(3)).keep().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("sliding-window", "sliding-widow"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(RegardError, match="did you mean sliding-window"):
            outputs(loaded, inputs)


def test_a_config_is_not_written_by_others():
    with pytest.raises(RegardError, match="config.regard is 'yes'"):
        tf.LlamaConfig(regard="yes")


@pytest.mark.parametrize("spec", SPECS)
def test_a_kept_model_is_freed(spec):
    model = FAMILIES["llama"].build("sdpa")
    kept = regard.swap(model, spec).keep()
    generated(kept, prompt("llama", kept))
    gone = weakref.ref(kept.model.layers[0].self_attn)
    del kept, model
    gc.collect()
    assert gone() is None
    assert all(m is not None for m in _KEPT)
