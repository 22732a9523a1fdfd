"""A mechanism that carries a state: decoding from it equals computing everything again without a cache."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache

import regard
from regard.attention import LinearAttention, SlidingWindow
from regard.attention.linear import LinearAttentionHeads
from regard.errors import RegardError, UnsupportedModel
from regard.runtime.carried import _CARRIERS, _HELD, StateLayer
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES, padding_mask

CARRYING = [
    "llama",
    "qwen3",
    "phi3",
    "gpt-neox",
    "gpt2",
    "opt",
    "olmoe",
    "deepseek",
    "bart",
    "llava",
    "qwen2-vl",
]
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "chunked": {"prefill_chunk_size": 4}}


@pytest.fixture
def llama():
    return FAMILIES["llama"].build()


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (n, w)
        for n in CARRYING
        for w in WAYS
        if w == "greedy" or n in ("llama", "gpt2") or (n, w) == ("bart", "beams")
    ],
)
def test_decoding_equals_computing_again(name, way):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    _, plain = generated(model, inputs)
    with regard.swap(model, LinearAttention()):
        options = {k: v for k, v in WAYS[way].items() if k != "prefill_chunk_size"}
        expected, scores = generated(model, inputs, use_cache=False, **options)
        found, others = generated(model, inputs, **WAYS[way])
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)
    assert differ(scores[0, -1], plain[0, -1])
    assert torch.equal(generated(model, inputs)[1], plain)


def test_a_layer_may_keep_keys_beside_one_that_carries_a_state(llama):
    inputs = prompt("llama", llama)
    with regard.swap(llama, LinearAttention(), layers=[1]):
        expected, _ = generated(llama, inputs, use_cache=False, num_beams=2)
        found, _ = generated(llama, inputs, num_beams=2)
        cache = llama(**inputs).past_key_values
    assert torch.equal(found, expected)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "StateLayer"]
    assert cache.layers[1].keys is None and cache.layers[1].state[0].shape == (2, 2, 8, 9)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_batch_equals_its_items(llama, padding):
    """Positions are given, for features of rotated queries and keys do depend on where they stand."""
    inputs = FAMILIES["llama"].inputs(llama, padding)
    valid = inputs.get("attention_mask", torch.ones(2, 9, dtype=torch.long))
    inputs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
    with regard.swap(llama, LinearAttention()):
        whole = outputs(llama, inputs)
        for item in range(2):
            mask = valid[item].bool()
            alone = outputs(llama, {"input_ids": inputs["input_ids"][item : item + 1, mask]})
            torch.testing.assert_close(whole[item][mask], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_it_continues_from_a_cache_computed_before(llama, padding, monkeypatch):
    """Absorbed keys and values give what reading them gives."""
    inputs = FAMILIES["llama"].inputs(llama, padding)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones(2, 9, dtype=torch.long))
    found = []
    for carries in (True, False):
        monkeypatch.setattr(LinearAttentionHeads, "carries_state", carries)
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
            with regard.swap(llama, LinearAttention()):
                parts = [
                    llama(input_ids=ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                    for a, b in ((6, 8), (8, 9))
                ]
        assert isinstance(cache.layers[0], StateLayer) is carries and cache.get_seq_length() == 9
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_gradients_reach_a_cache_that_was_absorbed(llama):
    ids = FAMILIES["llama"].inputs(llama)["input_ids"]
    with torch.no_grad():
        cache = llama(input_ids=ids[:, :6]).past_key_values
    cache.layers[0].keys.requires_grad_()
    keys = cache.layers[0].keys
    with regard.swap(llama, LinearAttention()):
        llama(input_ids=ids[:, 6:], past_key_values=cache).logits.sum().backward()
    assert keys.grad.abs().sum() > 0


def test_a_cache_with_states_goes_with_the_session(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with torch.no_grad():
        with regard.swap(llama, LinearAttention()):
            cache = llama(**inputs).past_key_values
            follow = {"input_ids": inputs["input_ids"][:, :2], "past_key_values": cache}
            expected = llama(**{**follow, "past_key_values": copy.deepcopy(cache)}).logits
        assert not _CARRIERS and not _HELD
        with pytest.raises(RegardError, match=r"holds the state of LinearAttention\(\)"):
            llama(**follow)
        with pytest.raises(RegardError, match="holds the state"), regard.swap(llama, SlidingWindow(3)):
            llama(**follow)
        with regard.swap(llama, LinearAttention()):
            assert torch.equal(llama(**follow).logits, expected)


def test_states_are_released_with_their_cache(llama):
    with regard.swap(llama, LinearAttention()), torch.no_grad():
        cache = llama(**FAMILIES["llama"].inputs(llama)).past_key_values
        layer, state = weakref.ref(cache.layers[0]), weakref.ref(cache.layers[0].state[0])
        del cache
        gc.collect()
        assert layer() is None or state() is not None
        llama(input_ids=torch.tensor([[5]]), use_cache=False)
    gc.collect()
    assert layer() is None and state() is None and not _HELD


def test_a_cache_can_be_reset_repeated_and_cut_to_a_selection(llama):
    ids = FAMILIES["llama"].inputs(llama)["input_ids"]
    kept = regard.swap(llama, LinearAttention()).keep()
    with torch.no_grad():
        kept(input_ids=ids[:, :2], use_cache=False)
        expected = kept(input_ids=ids).logits
        cache = kept(input_ids=ids[:, :5]).past_key_values
        cache.batch_repeat_interleave(2)
        wide = kept(input_ids=ids[:, 5:].repeat_interleave(2, 0), past_key_values=cache).logits
        torch.testing.assert_close(wide[::2], expected[:, 5:], rtol=1e-4, atol=1e-5)
        cache.batch_select_indices(torch.tensor([2]))
        assert cache.layers[0].state[0].shape[0] == 1
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(kept(input_ids=ids, past_key_values=cache).logits, expected)


def test_assisted_decoding_is_refused(llama):
    inputs = {k: v[:1] for k, v in prompt("llama", llama, "none").items()}
    with (
        pytest.raises(UnsupportedModel, match="generate without an assistant"),
        regard.swap(llama, LinearAttention()),
    ):
        llama.generate(**inputs, max_new_tokens=8, assistant_model=FAMILIES["llama"].build(seed=3))


def test_a_static_cache_is_refused(llama):
    refused = pytest.raises(UnsupportedModel, match="dynamic cache of full attention only.*StaticLayer")
    with refused, regard.swap(llama, LinearAttention()):
        llama.generate(**prompt("llama", llama), max_new_tokens=3, cache_implementation="static")
    generated(llama, prompt("llama", llama), cache_implementation="static")


def test_a_sliding_window_is_refused():
    mistral = FAMILIES["mistral"].build()
    inputs = FAMILIES["mistral"].inputs(mistral)
    with regard.swap(mistral, LinearAttention()):
        with pytest.raises(UnsupportedModel, match=r"text\.0 has a mask besides causal order"):
            mistral(**inputs, use_cache=False)
        with pytest.raises(UnsupportedModel, match="Sliding"):
            mistral(**inputs)
        mistral(input_ids=inputs["input_ids"][:, :3], use_cache=False)


@pytest.mark.parametrize(
    ("name", "words"), [("gpt-oss", "sink logits"), ("t5", "position bias"), ("swin", "a mask")]
)
def test_what_it_cannot_honour_is_refused(name, words):
    model = FAMILIES[name].build()
    layers = ["text.1"] if name == "gpt-oss" else None
    with pytest.raises(UnsupportedModel, match=words), regard.swap(model, LinearAttention(), layers):
        outputs(model, {**FAMILIES[name].inputs(model), **({"use_cache": False} if name != "swin" else {})})


def test_packed_sequences_are_refused(llama):
    ids = FAMILIES["llama"].inputs(llama)["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(UnsupportedModel, match="a mask besides"), regard.swap(llama, LinearAttention()):
        llama(input_ids=ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("name", ["bert", "vit", "clip", "bart", "whisper"])
def test_encoders_and_cross_attention(name):
    """Every site but windows; a padded batch equals its items."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model, "left" if FAMILIES[name].pads else "none")
    sites = [site.alias for site in regard.watch(model).sites]
    plain = outputs(model, inputs)
    with regard.swap(model, LinearAttention(), layers=sites) as swapped:
        found = outputs(model, inputs)
        alone = [outputs(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(2)]
    assert swapped.silent == [] and torch.isfinite(found).all()
    assert (found - plain).abs().max() > 1e-3
    if name != "clip":
        assert_same(torch.cat(alone), found, inputs, 1e-4)


def test_a_module_that_calls_sdpa_itself_runs_without_a_cache():
    falcon = FAMILIES["falcon"].build()
    ids = FAMILIES["falcon"].inputs(falcon)["input_ids"]
    with regard.swap(falcon, LinearAttention()):
        with pytest.raises(UnsupportedModel, match="use_cache=False"):
            falcon(input_ids=ids)
        whole = falcon(input_ids=ids, use_cache=False).logits
        part = falcon(input_ids=ids[:, :5], use_cache=False).logits
        mask = padding_mask("right")
        padded = falcon(input_ids=ids, attention_mask=mask, use_cache=False).logits
        alone = falcon(input_ids=ids[:1, :6], use_cache=False).logits
    torch.testing.assert_close(whole[:, :5], part, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[:1, :6], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1], whole[1], rtol=1e-4, atol=1e-5)


def test_a_copy_made_meanwhile_is_not_swapped(llama):
    inputs = prompt("llama", llama)
    expected, _ = generated(llama, inputs)
    with regard.swap(llama, LinearAttention()):
        twins = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
        assert not torch.equal(generated(llama, inputs)[0], expected)
        for twin in twins:
            assert torch.equal(generated(twin, inputs)[0], expected)


def test_bfloat16_keeps_a_float32_state(llama):
    inputs = prompt("llama", llama, "none")
    with regard.swap(llama, LinearAttention()), torch.no_grad():
        exact = llama(**inputs, use_cache=False).logits[:, -1]
        model = llama.bfloat16()
        cache = model(**inputs).past_key_values
        assert cache.layers[0].state[0].dtype == torch.float32
        whole = model(**inputs, use_cache=False).logits[:, -1].float()
        _, stepped = generated(model, inputs, max_new_tokens=1, prefill_chunk_size=3)
    scale = exact.abs().max()
    assert (stepped[:, 0].float() - exact).abs().max() < 0.1 * scale
    assert (whole - exact).abs().max() < 0.1 * scale
