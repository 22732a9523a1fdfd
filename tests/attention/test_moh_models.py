"""Mixture of heads in models of transformers: conversion, generation, tuning, saving, and what is refused."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import regard
from regard.attention import SlidingWindow, balance_loss, head_usage
from regard.attention.moh import apply_moh, remove_moh
from regard.engines import chosen as engine
from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from regard.lens import Entropy
from regard.models.moh import load_moh
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES

FAMILY = ("llama", "mistral", "qwen3")


@pytest.fixture
def eager(monkeypatch):
    """Leave heads out however short a text is."""
    monkeypatch.setattr(
        engine.attend_chosen, "__kwdefaults__",
        {"offset": None, "valid": None, "least": (2, 1), "most": 1.0},
    )  # fmt: skip


def stirred(routers):
    torch.manual_seed(4)
    with torch.no_grad():
        for router in routers.values():
            for weight in router.parameters():
                weight.normal_(0, 0.5)


def built(name="llama", **options):
    model = FAMILIES[name].build()
    chosen = {"shared": 1, "active": 1, **options}
    stirred(apply_moh(model, **chosen))
    return model


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("kind", ["query_norm", "learned"])
@pytest.mark.parametrize("shared", [0, 1, 4])
def test_all_heads_on_is_the_model_as_it_was(family, kind, shared):
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs(model, "left")
    plain, names = outputs(model, inputs), set(model.state_dict())
    routers = apply_moh(model, shared, 4 - shared, kind)
    assert_same(outputs(model, inputs), plain, inputs)
    new = set(model.state_dict()) - names
    assert len(routers) == 2 and bool(new) == (kind == "learned") and all("head_router" in n for n in new)
    remove_moh(model)
    assert torch.equal(outputs(model, inputs), plain) and set(model.state_dict()) == names
    assert not model.base_model._forward_pre_hooks and not hasattr(model.config.to_dict(), "regard")


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("kind", ["query_norm", "learned", "random"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_leaving_heads_out_changes_nothing(eager, family, kind, padding):
    found = []
    for sparse in (True, False):
        model = built(family, kind=kind, sparse=sparse)
        inputs = FAMILIES[family].inputs(model, padding)
        torch.manual_seed(2)
        found.append(outputs(model, inputs))
    assert_same(found[0], found[1], inputs)
    assert differ(found[0], outputs(FAMILIES[family].build(), inputs))


def test_the_gates_are_those_of_the_definition():
    model = built(kind="query_norm", sparse=False)
    inputs, seen = FAMILIES["llama"].inputs(model), {}
    attention = model.model.layers[0].self_attn
    hooks = [
        attention.q_proj.register_forward_hook(lambda m, a, out: seen.update(q=out)),
        attention.o_proj.register_forward_pre_hook(lambda m, a: seen.update(heads=a[0])),
    ]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    norms = seen["q"].unflatten(-1, (4, -1)).norm(dim=-1)[..., 1:]
    top = norms.argmax(-1) + 1
    on = seen["heads"].unflatten(-1, (4, -1)).abs().sum(-1) > 0
    assert on[..., 0].all() and torch.equal(on[..., 1:].long().argmax(-1) + 1, top)
    assert (on.sum(-1) == 2).all()


@pytest.mark.parametrize("kind", ["query_norm", "learned"])
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_it_generates_as_without_a_cache(eager, kind, way):
    model = built(kind=kind)
    inputs = prompt("llama", model)
    tokens, scores = generated(model, inputs, **way)
    again, others = generated(model, inputs, **{**way, "cache_implementation": None, "use_cache": False})
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)


def test_decoding_reads_the_keys_of_chosen_heads_alone(eager, monkeypatch):
    read = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        engine.F, "scaled_dot_product_attention",
        lambda q, k, v, *a, **o: read.append(k.shape[1]) or real(q, k, v, *a, **o),
    )  # fmt: skip
    model = FAMILIES["llama"].build()
    apply_moh(model, 0, 1)
    ids = torch.randint(5, 90, (1, 9))
    with torch.no_grad():
        cache = model(ids).past_key_values
        read.clear()
        model(ids[:, :1], past_key_values=cache)
    assert read == [1, 1]  # of two key heads, in each of two layers


def test_it_is_tuned_with_a_balance_and_padding_does_not_count():
    model = built(kind="learned").train()
    inputs = FAMILIES["llama"].inputs(model, "left")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    balance = balance_loss(model)
    (loss + 0.01 * balance).backward()
    routers = [layer.self_attn.head_router for layer in model.model.layers]
    assert all(p.grad.any() for router in routers for p in router.parameters())
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :3] = 7
    model(**other)
    torch.testing.assert_close(balance_loss(model), balance)
    soft = built(kind="query_norm").train()
    soft(**inputs, labels=inputs["input_ids"]).loss.backward()
    hard = built(kind="query_norm")
    hard(**inputs, labels=inputs["input_ids"]).loss.backward()
    one, two = (m.model.layers[0].self_attn.q_proj.weight.grad for m in (soft, hard))
    assert differ(one, two)


def test_usage_of_a_model():
    model = built(kind="query_norm")
    inputs = FAMILIES["llama"].inputs(model, "left")
    with head_usage(model) as usage:
        outputs(model, inputs)
    table = usage.heads
    assert table.sites[0] == "text.0" and set(usage.tokens.values()) == {15}
    assert (table.grid("on")[:, 0] == 1).all() and table.grid("on").sum(1) == pytest.approx([2, 2])


def test_a_copy_has_routers_of_its_own(eager):
    model = built(kind="learned")
    inputs = FAMILIES["llama"].inputs(model)
    expected = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, inputs), expected)
        own = twin.model.layers[0].self_attn.head_router
        assert own.padding is not model.model.layers[0].self_attn.head_router.padding
        assert own.padding is twin.model.layers[1].self_attn.head_router.padding
        remove_moh(twin)
        assert differ(outputs(twin, inputs), expected)
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", ["query_norm", "learned"])
@pytest.mark.parametrize("sparse", [True, False])
def test_it_is_saved_and_loaded(tmp_path, kind, sparse):
    model = built(kind=kind, sparse=sparse, shared=[1, 0], active=[1, 3])
    inputs = FAMILIES["llama"].inputs(model)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path / "one")
    again = load_moh(tmp_path / "one")
    assert_same(outputs(again, inputs), expected, inputs)
    routers = [layer.self_attn.head_router for layer in again.model.layers]
    assert [(r.shared, r.active, r.kind, r.sparse) for r in routers] == [
        (1, 1, kind, sparse),
        (0, 3, kind, sparse),
    ]
    again.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert_same(outputs(load_moh(tmp_path / "two"), inputs), expected, inputs)
    careless = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    with pytest.raises(RegardError, match=r"load it with regard\.models\.moh\.load_moh"):
        careless(**inputs)
    remove_moh(again)
    again.save_pretrained(tmp_path / "three")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    assert_same(outputs(plain, inputs), outputs(again, inputs), inputs)
    with pytest.raises(RegardError, match="heads were not converted"):
        load_moh(tmp_path / "three")
    with pytest.raises(RegardError, match="holds no model"):
        load_moh(tmp_path / "nowhere")


def test_lenses_edits_and_swaps_beside_it(eager):
    model = built(kind="query_norm")
    inputs = FAMILIES["llama"].inputs(model)
    expected = outputs(model, inputs)
    with regard.watch(model, Entropy()) as seen:
        assert torch.equal(outputs(model, inputs), expected)
    assert seen[Entropy].grid("entropy").shape == (2, 4)
    with regard.swap(model, SlidingWindow(3)):
        assert differ(outputs(model, inputs), expected)
    assert torch.equal(outputs(model, inputs), expected)
    kept = regard.swap(model, SlidingWindow(3)).keep()
    assert "mixture_of_heads" in kept.config.regard
    regard.unswap(kept)


def test_any_model_can_learn_to_route():
    model = FAMILIES["gpt2"].build()
    inputs = FAMILIES["gpt2"].inputs(model)
    plain = outputs(model, inputs)
    apply_moh(model, 1, 3, "learned")
    assert_same(outputs(model, inputs), plain, inputs)
    with pytest.raises(UnsupportedModel, match="no projection q_proj"):
        apply_moh(FAMILIES["gpt2"].build(), 1, 3)


def test_refusals_leave_the_model_alone():
    model = FAMILIES["llama"].build()
    before = set(model.state_dict())
    for options, kind, words in (
        ({"shared": 4, "active": 1}, RegardError, "more than the 4 heads"),
        ({"shared": [1], "active": 1}, RegardError, "shared has 1 numbers, and there are 2 layers"),
        ({"shared": 1, "active": [1, 0]}, RegardError, "active is 0, and 3 of 4 heads"),
        ({"shared": 1, "active": 1, "kind": "norm"}, RegardError, "kind is 'norm'"),
        ({"shared": 1, "active": 1, "kind": "output_norm", "sparse": True}, RegardError, "sparse=False"),
        ({"shared": 1, "active": 1, "layers": [7]}, NoSuchSite, "no layer 7"),
        ({"shared": 1, "active": 1, "layers": []}, NoSuchSite, "no layers"),
    ):
        with pytest.raises(kind, match=words):
            apply_moh(model, **options)
    assert set(model.state_dict()) == before and not model.model.layers[0].self_attn._forward_pre_hooks
    with pytest.raises(RegardError, match="has no routers"):
        remove_moh(model)
    assert list(apply_moh(model, 1, 1, layers=[1])) == ["text.1"]
    with pytest.raises(RegardError, match=r"text\.1 has a router already"):
        apply_moh(model, 1, 1)
    with pytest.raises(UnsupportedModel, match="sparse=False"):
        apply_moh(FAMILIES["falcon"].build(), 1, 1, "learned")
    with pytest.raises(UnsupportedModel, match="Linear"):
        apply_moh(torch.nn.Linear(3, 3), 1, 1)
