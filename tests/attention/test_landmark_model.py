"""Landmarks in transformers models: the token, training, a memory in the model's cache, generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import regard
from regard.attention import Landmark, LandmarkMemory, add_landmark_token
from regard.attention.landmark import Landmarks
from regard.attention.landmark.turns import turns_of_module
from regard.errors import RegardError, UnsupportedModel
from tests.support.families import FAMILIES

MARK, VOCABULARY = 60, 61


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(1, MARK, (2, 37), generator=torch.Generator().manual_seed(1))


MARKS = Landmarks(MARK, 5)
OPTIONS = {"top_k": 2, "memory": 4}


def greedy_without_cache(model, ids, new):
    """The likeliest tokens, landmarks put in, each from the whole text read anew."""
    for _ in range(new):
        text = MARKS.insert(ids).ids
        logits = model(text, use_cache=False).logits[:, -1]
        logits[:, MARK] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def test_generation_over_a_memory_equals_reading_anew(llama, ids):
    plain = llama.generate(ids, max_new_tokens=11, do_sample=False)
    with MARKS.memory(llama, **OPTIONS):
        expected = greedy_without_cache(llama, ids, 11)
        assert torch.equal(MARKS.generate(llama, ids, max_new_tokens=11, do_sample=False), expected)
    assert not torch.equal(plain, expected) and not (expected == MARK).any()


def test_beams_are_reordered_with_the_memory(llama, ids):
    with MARKS.memory(llama, **OPTIONS):
        found = MARKS.generate(llama, ids, max_new_tokens=9, num_beams=3, do_sample=False)
        one = MARKS.generate(llama, ids[1:], max_new_tokens=9, num_beams=3, do_sample=False)
    assert torch.equal(found[1:], one)


def test_rows_of_other_lengths_generate_as_alone(llama, ids):
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    with MARKS.memory(llama, **OPTIONS):
        both = MARKS.generate(llama, ids * mask, mask, max_new_tokens=9, do_sample=False)
        alone = MARKS.generate(llama, ids[:1, 8:], max_new_tokens=9, do_sample=False)
        other = MARKS.generate(llama, ids[1:], max_new_tokens=9, do_sample=False)
    assert torch.equal(both[0, 8:], alone[0]) and torch.equal(both[1], other[0])


def test_padding_of_a_row_that_has_ended_is_no_misplaced_landmark(llama, ids):
    with MARKS.memory(llama, **OPTIONS):
        free = MARKS.generate(llama, ids, max_new_tokens=12, do_sample=False)
        end = int(free[0, 38])
        found = MARKS.generate(llama, ids, max_new_tokens=12, do_sample=False, eos_token_id=end)
    assert found[0, 38] == end and not found[0, 39:].any()


def test_a_memory_stays_bounded_where_the_cache_would_grow(llama, ids):
    long = ids.repeat(1, 12)
    with MARKS.memory(llama, **OPTIONS):
        cache = llama(MARKS.insert(long).ids, use_cache=True).past_key_values
    sizes = [sum(x.numel() for x in layer.state[1:]) for layer in cache.layers]
    most = 2 * 2 * 8 * (2 * 4 * 5 + 4 + 2 * 5)  # batch, key heads, width; blocks, marks, a section
    assert max(sizes) <= most and cache.get_seq_length() == long.shape[1] + long.shape[1] // 4


def test_chunks_of_a_prompt_are_the_prompt(llama, ids):
    text = MARKS.insert(ids.repeat(1, 3)).ids
    with MARKS.memory(llama, **OPTIONS):
        whole = llama(text, use_cache=False).logits
        cache, parts = None, []
        for part in text.split(17, 1):
            out = llama(part, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_positions_of_the_model_are_given_back(llama):
    turns = turns_of_module(llama.model.layers[0].self_attn)
    with regard.swap(llama, LandmarkMemory(block=5, top_k=9, local=10)):
        text = MARKS.insert(torch.randint(1, MARK, (1, 36))).ids
        found = llama(text, use_cache=False).logits
    with regard.swap(llama, Landmark(5)):
        torch.testing.assert_close(found, llama(text, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert turns.rates.shape == (4,)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_without_rotary_positions_of_this_kind_are_refused(name):
    model = FAMILIES[name].build()
    with pytest.raises((UnsupportedModel, RegardError)):
        regard.swap(model, LandmarkMemory(block=4)).__enter__()


def test_offloaded_blocks_are_read_from_where_they_are(llama, ids):
    text = MARKS.insert(ids).ids
    with MARKS.memory(llama, **OPTIONS):
        near = llama(text, use_cache=False).logits
    with MARKS.memory(llama, **OPTIONS, offload="cpu"):
        torch.testing.assert_close(llama(text, use_cache=False).logits, near)
    gone = pytest.raises(
        NotImplementedError, match="meta"
    )  # keys really go there, and are fetched from there
    with gone, MARKS.memory(llama, **OPTIONS, offload="meta"):
        llama(text, use_cache=False)


def test_tokens_without_landmarks_are_refused(llama, ids):
    with pytest.raises(RegardError, match="no landmark at token 4"), MARKS.memory(llama, **OPTIONS):
        llama(ids)
    with pytest.raises(RegardError, match="a landmark at token 2"), MARKS.memory(llama, **OPTIONS):
        llama(torch.tensor([[1, 2, MARK, 3]]))
    llama(ids)


def test_training_lowers_the_loss_and_passes_over_landmarks(llama, ids):
    text = MARKS.insert(ids, labels=ids)
    optimiser = torch.optim.AdamW(llama.parameters(), 3e-3)
    losses = []
    with MARKS.training(llama.train()):
        for _ in range(8):
            loss = llama(text.ids, labels=text.labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        landmark = llama.get_input_embeddings().weight.grad[MARK]
    assert losses[-1] < losses[0] - 0.5 and landmark.abs().sum() > 0
    logits = MARKS.logits(llama.eval(), ids)
    assert logits.shape == (2, 37, VOCABULARY) and (logits[..., MARK] == -torch.inf).all()


def test_the_token_is_new_once_and_the_mean_of_the_others(smollm, tmp_path):
    model, tokenizer = regard.load()
    before, count = model.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    marks = add_landmark_token(model, tokenizer, block=8)
    weight = model.get_input_embeddings().weight
    assert marks.id == count and weight.shape[0] == count + 1
    assert torch.equal(weight[:-1], before)
    torch.testing.assert_close(weight[-1], before.mean(0), rtol=1e-4, atol=1e-5)
    assert add_landmark_token(model, tokenizer, block=8) == marks
    ids = tokenizer(
        "The quick brown fox jumps over the lazy dog, and then it sleeps.", return_tensors="pt"
    ).input_ids
    with marks.memory(model, top_k=1, longest=8192):
        out = marks.generate(model, ids, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 6) and not (out == marks.id).any()


def test_a_trained_swap_is_saved_and_comes_back(llama, ids, tmp_path):
    text = MARKS.insert(ids).ids
    model = MARKS.training(llama).keep()
    expected = model(text).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(text).logits, expected)


REFUSED = {
    "an id outside the vocabulary": (lambda m, i: Landmarks(999, 5).training(m), "0 to 60"),
    "padding on the right": (
        lambda m, i: MARKS.generate(m, i, torch.cat([torch.ones(2, 36), torch.zeros(2, 1)], 1).long()),
        "on the left",
    ),
    "no new tokens": (lambda m, i: MARKS.generate(m, i, max_new_tokens=0), "max_new_tokens is 0"),
    "a dict": (lambda m, i: MARKS.generate(m, i, return_dict_in_generate=True), "returns ids"),
    "no tokenizer": (lambda m, i: add_landmark_token(m, "tokens"), "transformers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, llama, ids):
    call, words = REFUSED[name]
    with pytest.raises(RegardError, match=words):
        call(llama, ids)
