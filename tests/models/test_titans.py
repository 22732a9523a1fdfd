"""Titans as models of transformers: caches, padding, beams, saving, checkpointing, refusals."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.models.titans import TitansConfig, TitansForCausalLM
from regard.runtime.carried import StateLayer

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "window": 4,
    "num_attention_heads": 2, "persistent": 2, "chunk_size": 3, "tie_word_embeddings": False,
}  # fmt: skip
each = pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])


def small(variant="mac", seed=0, **options):
    torch.manual_seed(seed)
    model = TitansForCausalLM(TitansConfig(**{**SIZES, "variant": variant, **options})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2 and len(weight) > 4:
                weight.mul_(8)
    return model


def tokens(length, batch=2, seed=0):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


@each
def test_a_cache_goes_on_where_it_stopped_and_does_not_grow(variant):
    model, ids = small(variant), tokens(15)
    cache, logits, start, held = None, [], 0, set()
    for size in (4, 1, 1, 9):
        out = model(ids[:, start : start + size], past_key_values=cache)
        logits, cache, start = [*logits, out.logits], out.past_key_values, start + size
        held.add(sum(t.numel() for layer in cache.layers for t in layer.state))
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-3, atol=1e-4)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert len(held) == 1 and cache.get_seq_length() == 15


@each
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_prompts_generate_like_each_alone(variant, beams):
    model, ids = small(variant), tokens(9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, **asked)
    for item in range(2):
        alone = ids[item : item + 1, mask[item].bool()]
        expected = model.generate(alone, use_cache=beams == 1, **asked)
        assert torch.equal(found[item, 9:], expected[0, alone.shape[1] :])
    off = (model(ids, attention_mask=mask).logits - model(ids).logits)[:, 4:].abs().amax((1, 2))
    assert off[0] > 1e-2 and off[1] < 1e-4


@each
def test_saved_and_loaded_it_is_the_same(variant, tmp_path):
    model, ids = small(variant), tokens(9)
    model.save_pretrained(tmp_path)
    again, info = TitansForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is TitansForCausalLM


def test_fresh_weights_are_those_of_the_layer():
    torch.manual_seed(0)
    core = TitansForCausalLM(TitansConfig(**SIZES)).model.layers[0].mixer.block.memory
    assert {n: g.bias[0].item() for n, g in core.gates.items()} == {
        "step": -1.0, "forget": -4.0, "momentum": -1.0,
    }  # fmt: skip
    assert 0.2 < core.weights[0].std() < 0.6 and core.short.filters.std() > 0.1


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_gradient_checkpointing_gives_the_same_gradients_and_it_trains(variant):
    model, ids = small(variant).train(), tokens(14)
    found = []
    for way in (False, True):
        if way:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_memory_that_diverges_is_named_with_its_layer():
    model = small("lmm", max_step=50.0, chunk_size=8)
    with pytest.raises(RegardError, match=r"layer 0: the memory diverged: a weight of its layer \d"):
        model(torch.full((1, 200), 7))


@pytest.mark.parametrize(
    ("ask", "kind", "told"),
    [
        (lambda m: m(tokens(5), output_attentions=True), UnsupportedModel, "no attention weights"),
        (lambda m: m(tokens(5), attention_mask=torch.ones(2, 1, 5, 5)), UnsupportedModel, "arbitrary mask"),
        (lambda m: m(tokens(5), attention_mask=torch.ones(2, 4)), ShapeMismatch, r"must be \[2, 5\]"),
        (lambda m: m(), RegardError, "input_ids or inputs_embeds"),
        (
            lambda m: m(tokens(5), past_key_values=StaticCache(m.config, max_cache_len=9)),
            UnsupportedModel,
            "a StaticLayer",
        ),
        (
            lambda m: m(tokens(5), past_key_values=m(tokens(5, 3)).past_key_values),
            ShapeMismatch,
            "layer 0: the state has tensors",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(ask, kind, told):
    with pytest.raises(kind, match=told):
        ask(small())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"variant": "max"}, "mac, mag, mal, lmm"),
        ({"num_attention_heads": 3}, "3 heads do not divide"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"memory_depth": 0}, "depth is 0"),
    ],
)
def test_wrong_sizes_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        TitansConfig(**{**SIZES, **options})
