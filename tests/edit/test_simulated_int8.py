"""A model as if in 8 bits: the grids, what is rounded, what an outlier costs, and that all is put back."""

import pytest
import torch
from torch import nn

from regard.edit.simulated_int8 import quantised, quantised_weight, simulate_int8
from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from tests.attention.models import outputs
from tests.support.families import FAMILIES


def test_the_grids():
    x = torch.linspace(-1, 3, 1001)
    found = quantised(x, -1.0, 3.0)
    assert len(found.unique()) == 256 and (found - x).abs().max() <= 4 / 255 / 2 + 1e-6
    assert quantised(torch.tensor([0.0, 9.0, -9.0]), -1.0, 3.0).tolist() == pytest.approx(
        [0, 3, -1], abs=0.01
    )
    assert (quantised(torch.rand(100) + 1, 1.0, 2.0) >= 0.99).all()
    weight = torch.randn(30, 40)
    rounded = quantised_weight(weight)
    step = weight.abs().max() / 127
    assert len(rounded.unique()) <= 255 and (rounded - weight).abs().max() <= step / 2 + 1e-6
    torch.testing.assert_close(rounded / step, (rounded / step).round(), atol=1e-3, rtol=0)
    assert quantised(x.bfloat16(), -1.0, 3.0).dtype == torch.bfloat16


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_it_is_the_arithmetic_written_out():
    model, x = small(), torch.randn(50, 8)
    first, second = (quantised_weight(model[i].weight) for i in (0, 2))
    inner = (x @ model[0].weight.T + model[0].bias).relu().detach()
    a = quantised(x, float(x.min()), float(x.max())) @ first.T + model[0].bias
    b = quantised(a.relu(), float(inner.min()), float(inner.max())) @ second.T + model[2].bias
    with simulate_int8(model, [x], residual=False) as made:
        torch.testing.assert_close(model(x), b)
    assert made.weights == ["0", "2"] and made.ranges["0"] == (float(x.min()), float(x.max()))


def test_an_outlier_spoils_the_rest_and_a_percentile_or_more_bits_save_it():
    model, x = small(), torch.randn(200, 8)
    outlying = x.clone()
    outlying[0, 0] = 1e3
    plain = model(outlying)[1:]

    def error(**options):
        with simulate_int8(model, [outlying], residual=False, weights=False, **options):
            return float((model(outlying)[1:] - plain).abs().mean())

    with simulate_int8(model, [x], residual=False, weights=False):
        tame = float((model(x)[1:] - plain).abs().mean())
    assert error() > 20 * tame and error(bits=16) < 5 * tame and error(percentile=99.0) < error() / 3


def test_the_running_range():
    model = small()
    ones = [torch.full((2, 8), value) for value in (1.0, 2.0)]
    with simulate_int8(model, ones, residual=False, weights=False) as made:
        pass
    assert made.ranges["0"] == pytest.approx((1.1, 1.1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_model_is_put_back_also_after_an_error(family):
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs(model)
    before, weights = outputs(model, inputs), [id(p) for p in model.parameters()]
    with simulate_int8(model, [inputs]) as made:
        inside = outputs(model, inputs)
    assert not torch.equal(inside, before) and any("(output)" in name for name in made.ranges)
    assert torch.equal(outputs(model, inputs), before)
    with pytest.raises(ZeroDivisionError), simulate_int8(model, [inputs]):
        raise ZeroDivisionError
    assert torch.equal(outputs(model, inputs), before) and weights == [id(p) for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_tied_embedding_is_not_rounded_with_the_head():
    model = FAMILIES["llama"].build()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    inputs = FAMILIES["llama"].inputs(model)
    with simulate_int8(model, [inputs], activations=False):
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_and_skip():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    with simulate_int8(model, [inputs], only=["*down_proj"], residual=False) as made:
        assert len(made.weights) == len(made.ranges) == 2
    with simulate_int8(model, [inputs], skip=["lm_head"], activations=False) as made:
        assert "lm_head" not in made.weights and not made.ranges


WRONG = [
    ({"calibration": []}, RegardError, "no batch"),
    ({"bits": 1}, RegardError, "bits is 1"),
    ({"percentile": 40.0}, RegardError, "percentile is 40.0"),
    ({"weights": False, "activations": False}, RegardError, "neither weights nor"),
    ({"only": ["*conv"]}, NoSuchSite, "named like '\\*conv'"),
    ({"skip": ["0", "2"]}, NoSuchSite, "skip names every"),
    ({"model": nn.ReLU()}, UnsupportedModel, "no linear layer"),
    ({"residual": True}, UnsupportedModel, "residual=False"),
]


@pytest.mark.parametrize(("options", "kind", "words"), WRONG)
def test_wrong_input_is_refused(options, kind, words):
    given = {"model": small(), "calibration": [torch.randn(3, 8)], "residual": False, **options}
    with (
        pytest.raises(kind, match=words),
        simulate_int8(given.pop("model"), given.pop("calibration"), **given),
    ):
        pass


def test_a_layer_that_was_never_reached_is_named():
    half = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    half.forward = lambda x, b=False: half["b" if b else "a"](x)
    with (
        simulate_int8(half, [torch.randn(2, 8)], residual=False),
        pytest.raises(RegardError, match="b was never"),
    ):
        half(torch.randn(2, 8), b=True)
