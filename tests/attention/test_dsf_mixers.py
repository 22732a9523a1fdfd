"""Every registered mechanism is its system, or is refused with the part that is not linear."""

import pytest
import torch
from torch import nn

from regard.attention import (
    MECHANISMS,
    Block,
    Context,
    LinearAttention,
    Mechanism,
    NormalizedAttention,
    SlidingWindow,
    Softmax,
)
from regard.attention.dsf import (
    SYSTEMS,
    assert_equivalent,
    effective_attention,
    oracle_error,
    system_of,
    to_ltv,
)
from regard.attention.dsf.rows import slots
from regard.attention.linear import LinearAttentionHeads
from regard.attention.softmax import SoftmaxAttention
from regard.errors import NotLinear, RegardError, ShapeMismatch

SPECS = {repr(spec): spec for kind in MECHANISMS.values() for spec in kind.examples()}
LINEAR = ("softmax", "sliding-window", "linear", "lightning-attention", "normalized", "qlstm")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(length, kv_heads=4):
    shapes = (2, 4, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 6)
    return tuple(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))


def given(mixer, length):
    """What a mixer takes, float64, of so many positions where it leaves that open."""
    if isinstance(mixer, Mechanism):
        return heads(length)
    x = mixer.example(torch.Generator().manual_seed(0))
    return normal(2, length, *x.shape[2:]) if mixer.causal else x


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("length", [9, 33])
def test_a_mechanism_is_its_system_or_is_refused(name, length):
    spec = SPECS[name]
    mixer = spec.build().double()
    try:
        error = oracle_error(mixer, given(mixer, length))
    except NotLinear as refusal:
        assert spec.registered not in LINEAR and len(str(refusal)) > 40
        return
    assert error < 1e-12


@pytest.mark.parametrize("spec", [Softmax(), SlidingWindow(5), LinearAttention()], ids=repr)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_grouped_keys_and_padding(spec, kv_heads):
    q, k, v = heads(11, kv_heads)
    assert oracle_error(spec, (q, k, v)) < 1e-12
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, 8:] = False
    ctx = Context.of(q, k, valid=valid)
    system, u = to_ltv(spec, (q, k, v, ctx))
    off = system.simulate(u) - spec.build()(q, k, v, ctx)
    assert off.transpose(1, 2)[valid].abs().max() < 1e-12


class Forgetful(LinearAttentionHeads):
    """Linear attention that also forgets, and whose system nobody wrote."""

    def forward(self, q, k, v, ctx=None):
        return 0.99 * super().forward(q, k, v, ctx)


class SoftmaxOfNext(SoftmaxAttention):
    """Softmax whose fast path is off by a position, against its own matrix."""

    def forward(self, q, k, v, ctx=None):
        return super().forward(q.roll(1, 2), k, v, ctx)


@pytest.mark.parametrize("kind", [Forgetful, SoftmaxOfNext])
def test_the_oracle_catches_a_fast_path_that_is_not_its_system(kind):
    assert oracle_error(kind(), heads(9)) > 1e-3


def test_mixers_are_compared_at_an_input():
    x = heads(9)
    assert_equivalent(Softmax(), SlidingWindow(9), x)
    with pytest.raises(AssertionError, match="position 0"):
        assert_equivalent(Softmax(), SlidingWindow(8), x)
    with pytest.raises(AssertionError, match="differ by"):
        assert_equivalent(Softmax(), LinearAttention(), x)
    torch.manual_seed(0)
    layers = [NormalizedAttention(dim=8, heads=2).build().double() for _ in range(2)]
    with pytest.raises(AssertionError, match="other values"):
        assert_equivalent(*layers, normal(2, 9, 8))


def test_effective_attention_of_a_mechanism_is_its_matrix():
    q, k, v = heads(9)
    for spec in (Softmax(), SlidingWindow(3), LinearAttention()):
        found = effective_attention(spec, (q, k, v))
        assert found.exact
        torch.testing.assert_close(found.weights, spec.build().matrix(q, k))


class WithNorm(Block):
    def __init__(self):
        super().__init__()
        self.after = nn.LayerNorm(4)


class WithConvolution(Block):
    def __init__(self):
        super().__init__()
        self.smooth = nn.Conv1d(4, 4, 3)


class Unknown(Block):
    pass


class OwnReference(SoftmaxAttention):
    def reference(self, q, k, v, ctx=None):
        return super().reference(q, k, v, ctx).relu()


@pytest.mark.parametrize(
    ("mixer", "told"),
    [
        (WithNorm(), "'after' is a norm"),
        (WithConvolution(), "'smooth' is a convolution"),
        (Unknown(), "no function is registered"),
        (OwnReference(), "defines `reference`"),
    ],
)
def test_what_is_not_linear_is_refused_with_its_part(mixer, told):
    x = heads(9) if isinstance(mixer, Mechanism) else normal(1, 9, 4)
    with pytest.raises(NotLinear, match=f"{type(mixer).__name__} cannot be written .*{told}"):
        to_ltv(mixer, x)


def test_a_mixer_joins_by_registering():
    with pytest.raises(NotLinear):
        to_ltv(Unknown(), normal(1, 9, 4))

    @system_of(Unknown)
    def twice(mixer, x):
        weights = 2 * torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
        return slots(weights, x.shape[2]), x

    try:
        system, u = to_ltv(Unknown(), normal(1, 9, 4))
        assert torch.equal(system.simulate(u), 2 * u)
        with pytest.raises(RegardError, match="has a system already, twice"):
            system_of(Unknown)(twice)
    finally:
        del SYSTEMS[Unknown]


Q, K, V = heads(9)


@pytest.mark.parametrize(
    ("mixer", "x", "kind", "told"),
    [
        (Softmax(), (Q, K, V, Context.of(Q, K, causal=False)), NotLinear, "not causal here"),
        (Softmax(), (Q[:, :, 4:], K, V), ShapeMismatch, "as many positions"),
        (Softmax(), Q, RegardError, r"takes \(q, k, v\)"),
        (NormalizedAttention(dim=4, heads=1), V, RegardError, "build it first"),
        (NormalizedAttention(dim=4, heads=1).build(), (Q, K, V), RegardError, "takes one tensor"),
        ("softmax", (Q, K, V), RegardError, "a mixer is"),
        (Softmax(), (Q.masked_fill(Q > 2, torch.nan), K, V), RegardError, "not finite"),
    ],
)
def test_wrong_input_is_refused(mixer, x, kind, told):
    with pytest.raises(kind, match=told):
        to_ltv(mixer, x)


def test_a_mixer_without_input_is_refused():
    with pytest.raises(RegardError, match="give x"):
        effective_attention(Softmax())
