"""The routing transformer as models of transformers: caches, padding, beams, saving, training, refusals."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.models.routing import RoutingConfig, RoutingForCausalLM
from regard.runtime.carried import StateLayer

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "window": 4,
    "num_attention_heads": 4, "clusters": 3, "cluster_size": 4, "tie_word_embeddings": False,
}  # fmt: skip


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = RoutingForCausalLM(RoutingConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return model


def tokens(length, batch=2, seed=0):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options", [{}, {"cluster_layers": 1}, {"cluster_layers": 0}, {"share_qk": False}], ids=str
)
def test_a_cache_goes_on_where_it_stopped(options):
    model, ids = small(**options), tokens(25)
    cache, logits, start = None, [], 0
    for size in (4, 1, 1, 19):
        out = model(ids[:, start : start + size], past_key_values=cache)
        logits, cache, start = [*logits, out.logits], out.past_key_values, start + size
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-3, atol=1e-4)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers) and cache.get_seq_length() == 25


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_prompts_generate_like_each_alone(beams):
    model, ids = small(), tokens(19)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    asked = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, **asked)
    for item in range(2):
        alone = ids[item : item + 1, mask[item].bool()]
        expected = model.generate(alone, use_cache=beams == 1, **asked)
        assert torch.equal(found[item, 19:], expected[0, alone.shape[1] :])
    off = (model(ids, attention_mask=mask).logits - model(ids).logits)[:, 6:].abs().amax((1, 2))
    assert off[0] > 1e-2 and off[1] < 1e-4


def test_by_the_published_selection_it_generates_without_a_cache():
    model, ids = small(selection="topw", cluster_size=9), tokens(12)
    found = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for step in range(4):
        assert torch.equal(model(found[:, : 12 + step]).logits[:, -1].argmax(-1), found[:, 12 + step])
    with pytest.raises(UnsupportedModel, match="cannot go on from a cache"):
        model(ids, use_cache=True)
    later = torch.cat([ids[:, :6], tokens(6, seed=1)], 1)
    assert not torch.allclose(model(later).logits[:, :6], model(ids).logits[:, :6])


def test_saved_and_loaded_it_is_the_same_centroids_too(tmp_path):
    model, ids = small(), tokens(19)
    model.train()(ids)
    model.eval().save_pretrained(tmp_path)
    again, info = RoutingForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    name = "model.layers.0.mixer.attention.mechanism.clusters.centroids"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is RoutingForCausalLM


def test_it_trains_with_the_commitment_and_checkpointing_changes_nothing():
    found = []
    for way in (False, True):
        model, ids = small().train(), tokens(24)
        if way:
            model.activation_checkpointing_enable()
        losses = []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(10):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        found.append(losses)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-3)
    one, other = small(commitment=0.0).train(), small(commitment=10.0).train()
    assert other(ids, labels=ids).loss > one(ids, labels=ids).loss + 1
    one.eval(), other.eval()
    torch.testing.assert_close(other(ids, labels=ids).loss, one(ids, labels=ids).loss)


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
        ({"selection": "best"}, "causal or topw"),
        ({"num_attention_heads": 3}, "3 heads do not divide"),
        ({"cluster_layers": 3}, "cluster_layers is 3, of 2 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"local_heads": 5}, "local_heads is 5"),
        ({"commitment": -1.0}, "commitment is -1"),
    ],
)
def test_wrong_sizes_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        RoutingConfig(**{**SIZES, **options})
