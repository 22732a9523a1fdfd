"""Clipped softmax: the formula, what is exactly zero, gradients, memory, a model, and wrong input."""

import pytest
import torch

import regard
from regard.attention import ClippedSoftmax, Context, get
from regard.attention.clipped import clip_range, clipped_attention, clipped_softmax
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.lens import MeanDistance
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES


def naive(scores, gamma, zeta):
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.minimum(
        torch.maximum((zeta - gamma) * weights + gamma, torch.tensor(0.0)), torch.tensor(1.0)
    )


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.1, 1.0), (-0.03, 1.03), (0.0, 1.1), (0.0, 1.0)])
def test_it_is_the_formula(gamma, zeta):
    scores = torch.randn(3, 4, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(clipped_softmax(scores, gamma=gamma, zeta=zeta), naive(scores, gamma, zeta))
    other = clipped_softmax(scores.transpose(1, -1), gamma=gamma, zeta=zeta, dim=1)
    torch.testing.assert_close(other.transpose(1, -1), naive(scores, gamma, zeta))


def test_a_key_is_dropped_at_alpha_over_length_plus_alpha():
    alpha, length = 2.0, 8
    limit = alpha / (length + alpha)
    for share, kept in ((limit * 0.999, False), (limit * 1.001, True)):
        scores = torch.tensor([share, 1 - share], dtype=torch.float64).log()
        weights = clipped_softmax(scores, alpha=alpha, length=length)
        assert (weights[0] > 0) == kept and weights.sum() < 1


def test_equal_scores_die_above_one_and_live_below():
    scores = torch.zeros(1, 16, requires_grad=True)
    for alpha, alive in ((0.5, True), (4.0, False)):
        weights = clipped_softmax(scores, alpha=alpha, length=16)
        assert bool(weights.any()) == alive
        (grad,) = torch.autograd.grad((weights * torch.arange(16)).sum(), scores)
        assert bool(grad.any()) == alive


def test_a_softmax_never_gives_nothing_where_this_does():
    q, k = torch.randn(2, 1, 2, 12, 8)
    for spec, none in ((get("softmax"), False), (ClippedSoftmax(alpha=6.0, length=12), True)):
        weights = spec.build().matrix(3 * q, k)
        visible = torch.ones(12, 12, dtype=torch.bool).tril()
        assert bool((weights[..., visible] == 0).any()) == none


@pytest.mark.parametrize("zeta", [1.0, 1.2])
def test_gradients_of_the_fast_path(zeta):
    """float32, long enough for several blocks, with hidden keys of both kinds."""
    torch.manual_seed(0)
    layer = ClippedSoftmax(gamma=-0.002, zeta=zeta).build()
    given = [torch.randn(1, 8, 600, 8, requires_grad=True) for _ in range(3)]
    valid = torch.ones(1, 600, dtype=torch.bool)
    valid[0, :50] = False
    ctx = Context.of(given[0], given[1], valid=valid)
    wanted = torch.randn(1, 8, 550, 8)
    found, expected = (
        torch.autograd.grad((out[:, :, 50:] * wanted).sum(), given)
        for out in (layer(*given, ctx), layer.reference(*given, ctx))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_training_keeps_no_square():
    kept = []
    layer = ClippedSoftmax(alpha=0.5, length=64).build()
    for length in (256, 512):
        given = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x
        ):
            layer(*given).sum()
        kept.append(sum(sizes))
    assert kept[1] <= 2 * kept[0]


@pytest.mark.parametrize("family", ["llama", "bert", "gemma2", "gpt-oss"])
def test_it_stands_in_a_model(family):
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs(model, "left")
    plain = outputs(model, inputs)
    with regard.swap(model, ClippedSoftmax(alpha=0.0, length=9)):
        assert_same(outputs(model, inputs), plain, inputs)
    with regard.swap(model, ClippedSoftmax(alpha=0.9, length=9)):
        assert differ(outputs(model, inputs), plain)
    assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_cached_decode_clips_as_one_forward_does(way):
    """The length is that of training: not the number of keys that a step happens to see."""
    model = FAMILIES["llama"].build("sdpa")
    inputs = prompt("llama", model)
    with regard.swap(model, ClippedSoftmax(alpha=0.9, length=9)):
        tokens, scores = generated(model, inputs, **way)
        again, others = generated(model, inputs, **{**way, "cache_implementation": None, "use_cache": False})
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)


def test_a_lens_sees_the_clipped_weights():
    model = FAMILIES["llama"].build("sdpa")
    inputs = FAMILIES["llama"].inputs(model)
    with regard.swap(model, ClippedSoftmax(alpha=0.9, length=9)), regard.watch(model, MeanDistance()) as seen:
        outputs(model, inputs)
    weights = seen.weights(layer=0, head=0)
    assert (weights.sum(-1) < 1).any() and (weights >= 0).all()


def test_alpha_may_grow():
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    layer = ClippedSoftmax(alpha=0.0, length=9).build()
    before = layer(q, k, v)
    layer.set(alpha=1.0, length=9)
    torch.testing.assert_close(layer(q, k, v), clipped_attention(q, k, v, alpha=1.0, length=9))
    assert differ(layer(q, k, v), before)


def test_presets_are_the_numbers_of_the_official_scripts():
    assert ClippedSoftmax(preset="bert").range() == (-0.025, 1.0)
    assert ClippedSoftmax(preset="opt").range() == (-12 / 512, 1.0)


WRONG = [
    ({}, "either alpha with length"),
    ({"alpha": 1.0, "gamma": -0.1, "length": 3}, "either alpha with length"),
    ({"alpha": 1.0}, "length of training"),
    ({"alpha": 1.0, "length": 0}, "length of training"),
    ({"alpha": -1.0, "length": 8}, "alpha is -1.0"),
    ({"alpha": float("nan"), "length": 8}, "alpha is nan"),
    ({"gamma": 0.1}, "gamma is 0.1"),
    ({"gamma": -0.1, "length": 8}, "length goes with alpha"),
    ({"gamma": -0.1, "zeta": 0.9}, "zeta is 0.9"),
    ({"preset": "gpt"}, "bert, opt"),
    ({"preset": "bert", "zeta": 1.1}, "says it all"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(RegardError, match=words):
        ClippedSoftmax(**options)
    if "preset" not in options:
        with pytest.raises(RegardError, match=words):
            clipped_softmax(torch.zeros(3), **options)


def test_wrong_calls_are_refused():
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ShapeMismatch, match="as many keys"):
        clipped_attention(q, q[:, :, :3], q, gamma=-0.1)
    with pytest.raises(ShapeMismatch, match="valid must be bool"):
        clipped_attention(q, q, q, gamma=-0.1, valid=torch.ones(1, 4, dtype=torch.bool))
    assert issubclass(UnsupportedModel, ValueError) and clip_range(1.0, 4, None) == (-0.25, 1.0)
