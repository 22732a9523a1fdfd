"""LightNet's models: cache in generate(), padding, both directions, images, saving, training, refusals."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    DynamicCache,
    StaticCache,
)

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.models.lightnet import (
    LightNetConfig,
    LightNetForCausalLM,
    LightNetForImageClassification,
    LightNetForMaskedLM,
)
from regard.runtime.carried import StateLayer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "gate_rank": 8,
}


def small(kind=LightNetForCausalLM, **options):
    torch.manual_seed(0)
    options = {"tie_word_embeddings": False, **SIZES, **options}
    model = kind(LightNetConfig(**options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4 if weight.ndim > 1 and "theta" not in name else 1)
    return model


def tokens(length, batch=2, seed=0):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


PARTS = [{}, {"tpe": False}, {"lrpe": False}, {"preset": "fla"}]


@pytest.mark.parametrize("options", PARTS, ids=str)
def test_a_cache_goes_on_where_it_stopped(options):
    model, ids = small(**options).double(), tokens(30)
    whole = model(ids, use_cache=False).logits
    moved = model(torch.cat([ids[:, :20], ids[:, 20:].flip(1)], 1), use_cache=False).logits
    torch.testing.assert_close(moved[:, :20], whole[:, :20])
    assert (moved[:, 20:] - whole[:, 20:]).abs().max() > 1e-3
    for sizes in ([1] * 30, [20, 1, 9]):
        cache, parts = None, []
        for piece in ids.split(sizes, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 30 and all(isinstance(layer, StateLayer) for layer in cache.layers)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generate_with_its_cache_gives_what_it_gives_without(options):
    model, ids = small(), tokens(6)
    calls = dict(max_new_tokens=8, do_sample=False, **options)
    found = model.generate(ids, **calls)
    assert torch.equal(found, model.generate(ids, use_cache=False, **calls))
    assert len(set(found[:, 6:].flatten().tolist())) > 3


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_prompts_generate_like_each_alone(beams):
    model, ids = small(), tokens(9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=beams)
    alone = model.generate(ids[:1, 4:], max_new_tokens=6, do_sample=False, num_beams=beams)
    assert torch.equal(found[0, 4 : alone.shape[1] + 4], alone[0])


def test_both_directions_see_all_and_padding_nothing():
    model = small(LightNetForMaskedLM, causal=False).double()
    ids = tokens(9)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    first = model(inputs_embeds=embedded).logits[0, 0]
    assert torch.autograd.grad(first.sin().sum(), embedded)[0][0, -1].abs().max() > 1e-6
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    found = model(ids, attention_mask=mask).logits[0, :5]
    torch.testing.assert_close(found, model(ids[:1, :5]).logits[0])
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, 2], ids[:, 2])
    torch.testing.assert_close(model(ids, labels=labels).loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "auto", "options"),
    [
        (LightNetForCausalLM, AutoModelForCausalLM, {}),
        (LightNetForCausalLM, AutoModelForCausalLM, {"tie_word_embeddings": True}),
        (LightNetForMaskedLM, AutoModelForMaskedLM, {"causal": False}),
        (LightNetForImageClassification, AutoModelForImageClassification,
         {"image_size": [8, 12], "patch_size": 4}),
    ],
)  # fmt: skip
def test_saved_and_loaded_it_is_the_same(tmp_path, kind, auto, options):
    model = small(kind, **options)
    given = tokens(7) if "image_size" not in options else torch.randn(2, 3, 8, 12)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is kind and AutoConfig.from_pretrained(tmp_path).grid is not None
    assert torch.equal(again(given).logits, model(given).logits)


@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"tpe": False}, {"lrpe": False}], ids=str)
def test_an_image_of_any_shape_is_judged_by_all_its_patches(options):
    model = small(LightNetForImageClassification, image_size=8, patch_size=4, num_labels=5, **options)
    for shape in ((8, 8), (4, 12)):
        image = torch.randn(2, 3, *shape, requires_grad=True)
        out = model(image, labels=torch.tensor([0, 3]))
        assert out.logits.shape == (2, 5)
        seen = torch.autograd.grad(out.loss, image)[0].abs().amax(1)
        assert (seen.unfold(1, 4, 4).unfold(2, 4, 4).amax((-1, -2)) > 0).all()
        expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 3]))
        torch.testing.assert_close(out.loss, expected)


def test_where_a_patch_stands_matters_with_positions_alone():
    image = torch.randn(1, 3, 8, 8)
    turned = image.flip(2, 3)
    bag = {"tpe": False, "lrpe": False, "patch_size": 1, "image_size": 8}
    for options, same in ((bag, True), ({**bag, "tpe": True}, False), ({**bag, "lrpe": True}, False)):
        model = small(LightNetForImageClassification, **options)
        assert torch.allclose(model(image).logits, model(turned).logits, atol=1e-5) == same


def test_it_learns_and_checkpointing_changes_nothing():
    model, ids = small().train(), tokens(12)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4


def filled():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("ask", "kind", "told"),
    [
        (lambda m: m(tokens(3), output_attentions=True), UnsupportedModel, "no attention weights"),
        (lambda m: m(tokens(3), past_key_values=filled()), UnsupportedModel, "keeps a state of its own"),
        (lambda m: m(tokens(3), past_key_values=StaticCache(m.config, 9)), UnsupportedModel, "Static"),
        (lambda m: m(tokens(3), attention_mask=torch.ones(2, 1, 3, 3)), UnsupportedModel, "arbitrary"),
        (lambda m: m(tokens(3), attention_mask=torch.ones(2, 5)), ShapeMismatch, r"must be \[2, 3\]"),
        (lambda m: m(tokens(3, 3), past_key_values=m(tokens(3)).past_key_values), ShapeMismatch, "holds"),
        (lambda m: m(), RegardError, "input_ids or inputs_embeds"),
        (lambda m: LightNetForMaskedLM(m.config), RegardError, "causal=False"),
        (lambda m: LightNetForCausalLM(LightNetConfig(**SIZES, causal=False)), RegardError, "MaskedLM"),
        (lambda m: LightNetConfig(hidden_size=10, num_attention_heads=3), RegardError, "do not divide"),
        (lambda m: LightNetConfig(patch_size=0), RegardError, "patch_size is 0"),
        (lambda m: small(LightNetForImageClassification, image_size=9, patch_size=4), RegardError, "9 x 9"),
        (lambda m: small(LightNetForImageClassification)(torch.zeros(1, 3, 8, 8)), ShapeMismatch, "16"),
        (lambda m: small(LightNetForMaskedLM, causal=False).model(tokens(3), past_key_values=DynamicCache()),
         RegardError, "both directions"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(ask, kind, told):
    with pytest.raises(kind, match=told):
        ask(small())
