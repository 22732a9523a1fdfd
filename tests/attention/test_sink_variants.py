"""Attention with a learned key or value, by other similarities and by kernels: formulas, models, refusals."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.attention import Context, Kernel, KeyValueBias, Similarity, Softmax, get
from regard.attention.kernel import kernel_attention
from regard.attention.key_value_bias import biased_attention
from regard.attention.similarity import similarity_attention
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.lens import Sinks
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES


def given(length=11, seed=0):
    return torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tril(length):
    return torch.ones(length, length, dtype=torch.float64).tril()


def test_a_learned_key_is_a_token_in_front_without_a_position():
    q, k, v = given()
    key, value = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    front = [torch.cat([x[None, :, None].expand(2, 4, 1, 8), y], 2) for x, y in ((key, k), (value, v))]
    mask = F.pad(tril(11).bool(), (1, 0), value=True)
    expected = F.scaled_dot_product_attention(q, *front, attn_mask=mask)
    torch.testing.assert_close(biased_attention(q, k, v, key=key, value=value), expected)
    front[1][:, :, 0] = 0
    expected = F.scaled_dot_product_attention(q, *front, attn_mask=mask)
    torch.testing.assert_close(biased_attention(q, k, v, key=key), expected)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(biased_attention(q, k, v, value=value), plain + value[None, :, None])


def test_a_key_of_minus_infinite_score_changes_nothing():
    q, k, v = given()
    q = q.abs()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(biased_attention(q, k, v, key=torch.full((1, 8), -1e5).double()), plain)


def test_the_learned_key_takes_what_the_rows_lack():
    q, k, _ = given()
    layer = KeyValueBias(heads=4, width=8).build().double()
    with torch.no_grad():
        layer.key.copy_(20 * q[:, :, 3].mean(0))
    sums = layer.matrix(q, k).sum(-1)
    assert (sums < 1).all() and bool((sums < 0.2).any())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "elu"])
def test_similarities_are_their_formulas(kind, normalise):
    q, k, v = given()
    scores = q @ k.transpose(2, 3) / 8**0.5
    weights = (1 / (1 + (-scores).exp()) if kind == "sigmoid" else F.elu(scores) + 1) * tril(11)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    found = similarity_attention(q, k, v, kind=kind, normalise=normalise)
    torch.testing.assert_close(found, weights @ v)
    sums = Similarity(kind=kind, normalise=normalise).build().matrix(q, k).sum(-1)
    assert bool(((sums - 1).abs() < 1e-6).all()) == normalise


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("feature", ["elu", "identity", "mlp"])
def test_kernels_are_their_formulas(feature, normalise):
    torch.manual_seed(0)
    q, k, v = given()
    width = 8 if feature == "mlp" else None
    layer = Kernel(feature=feature, normalise=normalise, width=width).build().double()
    maps = {"elu": lambda x: F.elu(x) + 1, "identity": lambda x: x}
    if feature == "mlp":
        maps["mlp"] = lambda x: (x @ layer.first.weight.T).relu() @ layer.second.weight.T
    weights = maps[feature](q) @ maps[feature](k).transpose(2, 3) / 8**0.5 * tril(11)
    total = weights.sum(-1, keepdim=True)
    if normalise:
        weights = weights / (total + 1e-8 if feature == "elu" else total.abs().clamp(min=1))
    torch.testing.assert_close(layer(q, k, v), weights @ v)
    if feature != "mlp":
        torch.testing.assert_close(
            kernel_attention(q, k, v, feature=feature, normalise=normalise), weights @ v
        )


SPECS = [
    KeyValueBias(), KeyValueBias(kind="key-value"), KeyValueBias(kind="value"), KeyValueBias(shared=True),
    Similarity(), Similarity(kind="elu", normalise=True),
    Kernel(), Kernel(feature="identity", normalise=True), Kernel(feature="mlp"),
]  # fmt: skip
in_models = pytest.mark.parametrize("spec", SPECS, ids=repr)


@in_models
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_they_stand_in_models_and_train(spec, family):
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs(model, "left")
    plain = outputs(model, inputs)
    torch.manual_seed(0)
    with regard.swap(model, spec) as swapped:
        moved = outputs(model, inputs)
        parameters = [p for m in swapped.mechanisms.values() for p in m.parameters()]
        if parameters:
            out = model(**inputs)
            name = "logits" if "logits" in out else "last_hidden_state"
            assert all(g.any() for g in torch.autograd.grad(out[name].sin().sum(), parameters))
    assert differ(moved, plain)
    assert_same(outputs(model, inputs), plain, inputs)


@in_models
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}])
def test_they_generate_as_without_a_cache(spec, way):
    model = FAMILIES["llama"].build("sdpa")
    inputs = prompt("llama", model)
    torch.manual_seed(0)
    with regard.swap(model, spec):
        tokens, scores = generated(model, inputs, **way)
        again, others = generated(model, inputs, **way, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)


def test_sinks_of_unnormalised_weights_are_measured_by_proxy():
    model = FAMILIES["llama"].build("sdpa")
    inputs = FAMILIES["llama"].inputs(model)
    lenses = (Sinks(name="plain"), Sinks(name="proxy", proxy=True))
    alone = {k: v[:1] for k, v in inputs.items()}
    with regard.swap(model, Similarity()), regard.watch(model, *lenses) as seen:
        outputs(model, alone)
        weights = seen.weights(layer=0, head=0)
    shares = weights / weights.sum(-1, keepdim=True)
    assert float(seen["proxy"]["alpha"][0]) == pytest.approx(float(shares[:, 0].mean()), rel=1e-4)
    assert seen["plain"]["alpha"][0] != pytest.approx(seen["proxy"]["alpha"][0], rel=1e-2)


WRONG = [
    (lambda: KeyValueBias(kind="query"), "key, key-value, value"),
    (lambda: KeyValueBias().build(), "needs heads"),
    (lambda: KeyValueBias(heads=4).build(), "needs width"),
    (lambda: KeyValueBias(heads=4, width=0).build(), "width is 0"),
    (lambda: Similarity(kind="cosine"), "sigmoid, elu"),
    (lambda: Kernel(feature="rbf"), "elu, identity, mlp"),
    (lambda: Kernel(feature="mlp").build(), "needs width"),
    (lambda: Kernel(width=8), "width goes with feature"),
    (lambda: kernel_attention(*given(), feature="mlp"), "has parameters"),
    (lambda: biased_attention(*given()), "a key, a value or both"),
    (lambda: similarity_attention(*(given() * torch.nan)), "NaN"),
]


@pytest.mark.parametrize(("call", "words"), WRONG)
def test_wrong_input_is_refused(call, words):
    with pytest.raises(RegardError, match=words):
        call()


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = given()
    with pytest.raises(ShapeMismatch, match=r"the key must be \[4, 8\]"):
        biased_attention(q, k, v, key=torch.zeros(3, 8))
    with pytest.raises(ShapeMismatch, match="the value must be"):
        biased_attention(q, k, v, value=torch.zeros(4, 7))
    with pytest.raises(ShapeMismatch, match="built for 5"):
        Kernel(feature="mlp", width=5).build()(q.float(), k.float(), v.float())


def test_what_a_mechanism_cannot_honour_is_refused_in_words():
    q, k, v = given()
    sinks = Context.of(q, k)
    object.__setattr__(sinks, "sink_logits", torch.zeros(4))
    for spec in (Similarity(), KeyValueBias(heads=4, width=8), Kernel()):
        with pytest.raises(RegardError, match="sink logits"):
            spec.build()(q.float(), k.float(), v.float(), sinks)
    model = FAMILIES["gpt-oss"].build("eager")
    with pytest.raises(UnsupportedModel, match="sink logits"), regard.swap(model, Similarity()):
        outputs(model, FAMILIES["gpt-oss"].inputs(model))
    assert get("similarity") == Similarity() and get("softmax") == Softmax()
