"""What patch refuses: unknown points, values that do not fit, routers that have chosen already."""

from contextlib import contextmanager

import pytest
import torch

import regard
from regard import Point
from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def patched(model, inputs, values):
    with torch.no_grad(), regard.patch(model, values):
        return model(**inputs).logits


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({}, RegardError, "at least one Point"),
        (Point("mlp", 0), RegardError, "mapping"),
        ({"mlp": 0.0}, RegardError, "takes Points"),
        ({Point("key", 0): 0.0}, NoSuchSite, "points are embedding"),
        ({Point("mlp", 0, head=1): 0.0}, NoSuchSite, "only 'head' has a head"),
        ({Point("mlp"): 0.0}, NoSuchSite, "needs a layer"),
        ({Point("mlp", 2): 0.0}, NoSuchSite, "no layer 2"),
        ({Point("head", 0): 0.0}, NoSuchSite, "a layer and a head"),
        ({Point("head", head=0): 0.0}, NoSuchSite, "a layer and a head"),
        ({Point("head", 0, head=4): 0.0}, NoSuchSite, "heads 0 to 3"),
        ({Point("router", 0): 0.0}, NoSuchSite, "no router"),
    ],
)
def test_unknown_points_are_refused_before_a_run(llama, values, error, match):
    with pytest.raises(error, match=match):
        regard.patch(llama, values)


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({Point("mlp", 1): torch.zeros(33)}, ShapeMismatch, r"shape \(2, 9, 32\).*shape \(33,\)"),
        ({Point("mlp", 1, position=0): torch.zeros(3, 32)}, ShapeMismatch, r"\(2, 32\).*\(3, 32\)"),
        ({Point("mlp", 1, position=0): torch.zeros(1, 2, 32)}, ShapeMismatch, r"\(2, 32\).*\(1, 2, 32\)"),
        ({Point("head", 0, head=1): torch.zeros(9, 32)}, ShapeMismatch, r"\(2, 9, 8\).*\(9, 32\)"),
        ({Point("mlp", 1): lambda x: x[:, :4]}, ShapeMismatch, r"\(2, 9, 32\).*\(2, 4, 32\)"),
        ({Point("mlp", 1): lambda x: None}, RegardError, "the value is NoneType"),
        ({Point("mlp", 1): "zero"}, RegardError, "the value is str"),
        ({Point("mlp", 1, position=9): 0.0}, NoSuchSite, "has 9 positions"),
        ({Point("mlp", 1, position=-10): 0.0}, NoSuchSite, "has 9 positions"),
        ({Point("head", 0, head=1, position=9): 0.0}, NoSuchSite, "has 9 positions"),
    ],
)
def test_values_that_do_not_fit_are_refused_when_run(llama, values, error, match):
    inputs = FAMILIES["llama"].inputs(llama)
    with pytest.raises(error, match=match):
        patched(llama, inputs, values)


class Router(torch.nn.Linear):
    """A router that returns its logits alone, of all sequences joined, [B * T, E]."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2))


class Mixture(torch.nn.Module):
    """Every expert on every token, by the softmax of the router."""

    def __init__(self):
        super().__init__()
        self.gate = Router(32, 3)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        share = self.gate(x).softmax(-1).view(*x.shape[:-1], 3)
        return sum(share[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


@pytest.fixture(scope="module")
def mixture():
    model = FAMILIES["llama"].build("sdpa")
    model.model.layers[1].mlp = Mixture()
    return model


def test_router_logits_are_patched_where_experts_follow_from_them(mixture):
    inputs = FAMILIES["llama"].inputs(mixture)
    mlp = mixture.model.layers[1].mlp
    with returning(mlp, lambda out, x: mlp.experts[1](x)):
        expected = patched(mixture, inputs, {Point("mlp", 0): lambda x: x})
    found = patched(mixture, inputs, {Point("router", 1): torch.tensor([-1e9, 0.0, -1e9])})
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ShapeMismatch, match=r"\(18, 3\) has no positions"):
        patched(mixture, inputs, {Point("router", 1, position=1): 0.0})


@contextmanager
def returning(module, change):
    """Change what a module returns, knowing what it was given."""
    handle = module.register_forward_hook(lambda m, args, out: change(out, args[0]))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_router_logits_are_refused_where_experts_were_chosen_with_them(name):
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    with pytest.raises(UnsupportedModel, match="would change nothing"):
        patched(model, inputs, {Point("router", 1): 0.0})
