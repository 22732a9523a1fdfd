"""Mechanisms by name, contexts, and the shapes that they refuse."""

import pytest
import torch

from regard.attention import (
    MECHANISMS,
    Context,
    LinearAttention,
    SlidingWindow,
    Softmax,
    Spec,
    from_dict,
    get,
)
from regard.attention.registry import mechanism
from regard.errors import RegardError, ShapeMismatch


def test_names():
    assert {"softmax", "sliding-window", "linear"} <= set(MECHANISMS)
    assert get("softmax") == Softmax() and get("sliding-window", window=4) == SlidingWindow(4)
    assert from_dict(SlidingWindow(4).to_dict()) == SlidingWindow(4) != SlidingWindow(5)
    with pytest.raises(RegardError, match="registered already, as Softmax"):
        mechanism("softmax")(SlidingWindow)
    assert MECHANISMS["softmax"] is Softmax
    with pytest.raises(RegardError, match="names no mechanism"):
        from_dict({"window": 3})


def test_a_spec_with_needed_options_must_say_which_to_try():
    with pytest.raises(RegardError, match="needs window; its examples"):
        super(SlidingWindow, SlidingWindow).examples()
    assert Spec.limit(3) is None


def qk(queries, keys, heads=4, kv_heads=2):
    return torch.randn(2, heads, queries, 8), torch.randn(2, kv_heads, keys, 8)


BAD = [
    (lambda: Context.of(*qk(5, 3)), "5 queries needs as many keys, and has 3"),
    (lambda: Context.of(*qk(3, 3, 4, 3)), "the heads of q be a multiple"),
    (lambda: Context.of(torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 6)), "agree in batch and dim"),
    (lambda: Context.of(torch.randn(4, 3, 8), torch.randn(4, 3, 8)), "q must be floating-point"),
    (lambda: Context.of(torch.ones(2, 4, 3, 8, dtype=torch.long), qk(3, 3)[1]), "q must be floating-point"),
    (lambda: Context.of(*qk(3, 3), valid=torch.ones(2, 4, dtype=torch.bool)), r"bool \[2, 3\]"),
    (lambda: Context.of(*qk(3, 3), valid=torch.ones(2, 3)), "is float32"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words[:16] for _, words in BAD])
def test_shapes_that_do_not_fit(make, words):
    with pytest.raises(ShapeMismatch, match=words):
        make()


def test_what_a_mechanism_cannot_honour_is_refused_without_a_model_too():
    q, k = qk(4, 4)
    ctx = Context(mask=Context.of(q, k).mask, bias=torch.zeros(1, 4, 4, 4))
    with pytest.raises(RegardError, match="LinearAttentionHeads was given a position bias"):
        LinearAttention().build()(q, k, k, ctx)
    assert SlidingWindow(2).build()(q, k, k, ctx).shape == q.shape


def test_each_layer_has_a_module_of_its_own():
    assert Softmax().build() is not Softmax().build()
    assert SlidingWindow(3).build().window == 3
