"""A swapped-in window against models that have one of their own, and against dense masks."""

import pytest
import torch
import transformers as tf

import regard
from regard.attention import SlidingWindow
from regard.runtime import Lens
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES, VOCAB, _decoder, padding_mask

WINDOWS = (1, 3, 256)


def mistral(window):
    """The same weights, with a window of the model's own or without one."""
    model = FAMILIES["mistral"].build("sdpa")
    made = _decoder("MistralForCausalLM", "MistralConfig", sliding_window=window)("sdpa").eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("window", WINDOWS)
def test_it_equals_the_window_that_a_model_has(window, padding):
    own, plain = mistral(window), mistral(None)
    inputs = FAMILIES["mistral"].inputs(own, padding)
    expected = outputs(own, inputs)
    with regard.swap(plain, SlidingWindow(window)):
        found = outputs(plain, inputs)
    assert_same(found, expected, inputs)
    assert differ(found, outputs(plain, inputs)) == (window < 9)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [2, 3])
def test_it_generates_what_a_model_with_that_window_does(window, way):
    own, plain = mistral(window), mistral(None)
    inputs = prompt("mistral", own)
    expected, scores = generated(own, inputs, **WAYS[way])
    with regard.swap(plain, SlidingWindow(window)):
        found, others = generated(plain, inputs, **WAYS[way])
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)


def test_an_assistant_may_help():
    plain, small = mistral(None), mistral(None)
    inputs = {k: v[:1] for k, v in prompt("mistral", plain, "none").items()}
    with regard.swap(plain, SlidingWindow(3)):
        alone = plain.generate(**inputs, max_new_tokens=8, do_sample=False)
        helped = plain.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=small)
    assert torch.equal(alone, helped)


def test_it_narrows_a_window_that_is_there_and_does_not_widen_it():
    own = mistral(4)
    inputs = FAMILIES["mistral"].inputs(own, "left")
    expected, narrow = outputs(own, inputs), outputs(mistral(2), inputs)
    with regard.swap(own, SlidingWindow(6)):
        assert_same(outputs(own, inputs), expected, inputs)
    with regard.swap(own, SlidingWindow(2)):
        assert_same(outputs(own, inputs), narrow, inputs)


def test_an_encoder_sees_both_ways():
    torch.manual_seed(0)
    bert = FAMILIES["bert"].build("sdpa")
    inputs = FAMILIES["bert"].inputs(bert, "left")
    i = torch.arange(9)
    near = (i[:, None] - i).abs() < 3
    dense = near[None, None] & inputs["attention_mask"].bool()[:, None, None]
    expected = outputs(bert, {**inputs, "attention_mask": dense})
    with regard.swap(bert, SlidingWindow(3)):
        assert_same(outputs(bert, inputs), expected, inputs)


class Kept(Lens):
    """Keeps the weights of every call."""

    def weights(self, block):
        self.tally.append(block.site, "weights", block.weights.clone())

    def result(self):
        return self.tally.get("weights")


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "t5", "bart", "qwen2-vl", "gemma3-images", "falcon"])
def test_every_sort_of_mask_bias_and_cap_is_kept(name):
    """Inside the window the scores are the model's: weights renormalise what was there, sinks counted."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model, "left" if name != "gpt-oss" else "none")
    with torch.no_grad(), regard.watch(model, Kept()) as plain:
        model(**inputs)
    first = regard.watch(model).anatomy.site(0).alias
    before = plain[Kept][first][0]
    with torch.no_grad(), regard.swap(model, SlidingWindow(3)), regard.watch(model, Kept()) as seen:
        model(**inputs)
    after = seen[Kept][first][0]
    i = torch.arange(before.shape[2])[:, None]
    near = (i - torch.arange(before.shape[3])) < 3
    expected = before * near
    rest = 0 if name != "gpt-oss" else 1 - before.sum(-1, keepdim=True)
    expected = expected / (expected.sum(-1, keepdim=True) + rest).clamp(min=1e-9)
    real = torch.ones(before.shape[:1] + before.shape[2:3], dtype=torch.bool)
    if name not in ("t5", "bart", "gpt-oss"):
        real = padding_mask("left", before.shape[2]).bool()
    torch.testing.assert_close(
        after.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-4, atol=1e-6
    )


def test_long_input_is_cut_into_blocks():
    torch.manual_seed(0)
    config = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, intermediate_size=48, max_position_embeddings=512)  # fmt: skip
    own = tf.MistralForCausalLM(tf.MistralConfig(**config, sliding_window=20)).eval()
    plain = tf.MistralForCausalLM(tf.MistralConfig(**config, sliding_window=None)).eval()
    plain.load_state_dict(own.state_dict())
    ids = torch.randint(5, VOCAB, (2, 301))
    mask = torch.ones_like(ids)
    mask[0, :150] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = outputs(own, inputs)
    with regard.swap(plain, SlidingWindow(20)):
        assert_same(outputs(plain, inputs), expected, inputs)
