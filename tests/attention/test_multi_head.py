"""`MultiHeadAttention`: the formula, positions, gates, padding, decoding, and what it refuses."""

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.attention import (
    QLSTM,
    LinearAttention,
    MultiHeadAttention,
    NormalizedAttention,
    SlidingWindow,
    Softmax,
)
from regard.attention.positions import Rotary, alibi
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel

LENGTH = 9


def layer(**options):
    torch.manual_seed(0)
    return MultiHeadAttention(**{"dim": 16, "heads": 4, **options}).double()


def given(batch=2, length=LENGTH, dim=16):
    return torch.randn(
        batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(length)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_multi_head_attention_of_torch(causal, bias):
    made, x = layer(causal=causal, bias=bias), given()
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True).double()
    with torch.no_grad():
        parts = (made.queries, made.keys, made.values)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.out_proj.weight.copy_(made.output.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
            theirs.out_proj.bias.copy_(made.output.bias)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(made(x), theirs(x, x, x, attn_mask=mask)[0])


def test_it_has_the_rotary_positions_grouped_heads_and_biases_of_qwen2():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

    config = Qwen2Config(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs, made, x = (
        Qwen2Attention(config, 0).double().eval(),
        layer(kv_heads=2, positions="rotary"),
        given(),
    )
    with torch.no_grad():
        for own, other in (("queries", "q"), ("keys", "k"), ("values", "v"), ("output", "o")):
            projection = getattr(theirs, f"{other}_proj")
            projection.weight.copy_(getattr(made, own).weight)
            if projection.bias is not None:
                projection.bias.zero_()
    angles = Qwen2RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    torch.testing.assert_close(made(x), theirs(x, angles, None)[0], rtol=1e-6, atol=1e-6)


def test_gates_norm_and_alibi_are_as_written():
    made, x = layer(gate="silu", head_norm=True, positions="alibi"), given()
    q, k, v = (p(x).view(2, LENGTH, 4, 4).transpose(1, 2) for p in (made.queries, made.keys, made.values))
    place = torch.arange(LENGTH)
    slopes = torch.tensor([2.0 ** (-2 * h) for h in (1, 2, 3, 4)])
    scores = q @ k.mT / 2 - slopes[:, None, None] * (place[:, None] - place)
    out = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = made.output(F.silu(made.gate(x)) * out.transpose(1, 2).reshape(2, LENGTH, 16))
    torch.testing.assert_close(made(x), expected)


def test_the_slopes_of_alibi_are_those_of_its_authors():
    bias = alibi(6, torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    expected = [-(2.0**-power) for power in (2, 4, 6, 8, 1, 3)]
    assert bias.flatten().tolist() == pytest.approx(expected)


def test_rotary_positions_are_relative():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turn = Rotary()

    def score(i, j):
        return (turn(q, torch.tensor([[i]])) * turn(k, torch.tensor([[j]]))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101))
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_a_gate_may_be_a_module():
    class Half(nn.Module):
        def forward(self, x):
            return x.new_full((x.shape[0], 4, x.shape[1], 1), 0.5)

    plain, x = layer(), given()
    halved = layer(gate=Half())
    halved.load_state_dict(plain.state_dict())
    torch.testing.assert_close(halved(x), plain(x) / 2)


@pytest.mark.parametrize("positions", [None, "rotary", "alibi"])
def test_a_batch_equals_its_items_wherever_padding_stands(positions):
    made, x = layer(positions=positions, kv_heads=2), given()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :3] = valid[1, 4:6] = False
    out = made(x, valid=valid)
    states = None
    for at in range(LENGTH):
        step, states = made.step(x[:, at : at + 1], states, valid=valid[:, at : at + 1])
        torch.testing.assert_close(step[valid[:, at]], out[:, at : at + 1][valid[:, at]])
    for item in range(2):
        torch.testing.assert_close(out[item, valid[item]], made(x[item : item + 1, valid[item]])[0])


def test_an_encoder_sees_both_ways():
    made, x = layer(causal=False), given()
    changed = x.clone()
    changed[:, -1] += 1
    assert (made(changed) - made(x))[:, 0].abs().min() > 1e-6
    causal = layer()
    assert torch.equal(causal(changed)[:, 0], causal(x)[:, 0])


def test_mechanisms_by_name_spec_options_and_built_are_the_same():
    x = given()
    made = [
        layer(mechanism=m)
        for m in (SlidingWindow(3), {"mechanism": "sliding-window", "window": 3}, SlidingWindow(3).build())
    ]
    assert torch.equal(made[0](x), made[1](x)) and torch.equal(made[0](x), made[2](x))
    by_name = layer(mechanism="normalized")
    assert (by_name.mechanism.heads, by_name.mechanism.output.in_features) == (4, 16)


def test_head_dim_need_not_divide_dim():
    made = layer(dim=10, heads=3, head_dim=6)
    assert made(given(dim=10)).shape == (2, LENGTH, 10) and made.output.in_features == 18


def test_dtype_device_copies_and_bfloat16():
    made = MultiHeadAttention(
        16, 4, mechanism="linear", gate="sigmoid", positions="rotary", dtype=torch.bfloat16
    )
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    out, state = made.step(given().bfloat16())
    assert out.dtype == torch.bfloat16 and state.inner[0].dtype == torch.float32
    assert torch.equal(copy.deepcopy(made)(given().bfloat16()), made(given().bfloat16()))


def test_a_state_of_fixed_size_stays_so_and_a_cache_grows():
    linear, softmax, x = layer(mechanism="linear"), layer(), given(length=40)
    sizes = {made: [made.step(x[:, :n])[1].numbers() for n in (10, 40)] for made in (linear, softmax)}
    assert sizes[linear][0] == sizes[linear][1] and sizes[softmax][1] == 4 * sizes[softmax][0]


def test_gradients_are_those_of_finite_differences():
    made = layer(dim=4, heads=2, mechanism="linear", positions="rotary", gate="sigmoid", kv_heads=1)
    assert torch.autograd.gradcheck(made, (given(1, 3, 4).requires_grad_(),))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"heads": True}, "heads is True"),
        ({"heads": 3}, "which 3 heads do not divide; give head_dim"),
        ({"kv_heads": 3}, "no multiple of the 3 kv_heads"),
        ({"mechanism": "softmacs"}, "did you mean softmax"),
        ({"mechanism": 3}, "mechanism is 3"),
        ({"mechanism": Softmax}, "mechanism is <class"),
        ({"mechanism": "sliding-window"}, "needs 'window'"),
        ({"positions": "sine"}, "positions is 'sine'"),
        ({"positions": "alibi", "mechanism": "linear"}, "no scores to add ALiBi's bias to"),
        ({"gate": "relu"}, "gate is 'relu'"),
        ({"mechanism": "qlstm", "positions": "rotary"}, "positions does not apply"),
        ({"mechanism": "normalized", "kv_heads": 2}, "kv_heads does not apply"),
        ({"mechanism": "qlstm", "causal": False}, "QLSTMLayer is only causal; give causal=True"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(RegardError, match=words):
        layer(**options)


def step_with(made, state, x=None):
    return made.step(given() if x is None else x, state)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer()(given(dim=8)), ShapeMismatch, r"x must be floating-point \[batch, time, 16\]"),
        (lambda: layer()(given().long()), ShapeMismatch, "and is int64"),
        (lambda: layer()(given(), valid=torch.ones(2, 3, dtype=torch.bool)), ShapeMismatch, r"bool \[2, 9\]"),
        (lambda: layer()(given(), valid=torch.ones(2, LENGTH)), ShapeMismatch, "is float32"),
        (lambda: layer()(given() * torch.nan), RegardError, "x holds NaN or infinity"),
        (lambda: layer(positions=Rotary(longest=8))(given()), RegardError, "position 8 is over the 8"),
        (lambda: layer(head_dim=3, positions="rotary")(given()), ShapeMismatch, "an even width"),
        (lambda: layer(causal=False).step(given()), RegardError, "cannot decode"),
        (lambda: step_with(layer(), torch.zeros(3)), RegardError, "must be what step"),
        (lambda: step_with(layer(), layer().step(given(1))[1]), ShapeMismatch, "of 1 sequences, and x of 2"),
        (lambda: step_with(layer(), layer(kv_heads=2).step(given())[1]), ShapeMismatch, "state's keys"),
        (lambda: step_with(layer(), layer().float().step(given().float())[1]), ShapeMismatch, "state's keys"),
        (
            lambda: layer(mechanism=QLSTM(dim=16))(given(), valid=torch.ones(2, LENGTH, dtype=torch.bool)),
            RegardError,
            "cannot leave out padding",
        ),
        (lambda: layer(mechanism=NormalizedAttention(dim=8, heads=2))(given()), ShapeMismatch, "x must be"),
    ],
)
def test_bad_calls_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_block_without_steps_cannot_decode():
    class Still(NormalizedAttention.module):
        step = None

    made = layer(mechanism=Still(16, 4, None, "exp"))
    with pytest.raises(UnsupportedModel, match="cannot decode step by step: it has no step"):
        made.step(given())


def test_a_mechanism_that_steps_otherwise_cannot_decode():
    class Otherwise(LinearAttention.module):
        exempt: ClassVar = {"step": "it looks at all positions at once"}

    with pytest.raises(
        UnsupportedModel, match="cannot decode step by step: it looks at all positions at once"
    ):
        layer(mechanism=Otherwise()).step(given())


def test_linear_attention_in_it_is_linear_attention():
    made, x = layer(mechanism=LinearAttention()), given()
    q, k, v = (p(x).view(2, LENGTH, 4, 4).transpose(1, 2) for p in (made.queries, made.keys, made.values))
    expected = LinearAttention().build().reference(q, k, v)
    torch.testing.assert_close(made(x), made.output(expected.transpose(1, 2).reshape(2, LENGTH, 16)))
