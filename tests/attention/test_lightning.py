"""Lightning attention: every method is the formula, in pieces as in one, padded, packed, and backwards."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.attention import (
    Context,
    LightningAttention,
    MultiHeadAttention,
    decay_rates,
    get,
    lightning_attention,
)
from regard.attention.dsf import oracle_error
from regard.errors import RegardError, ShapeMismatch

METHODS = ("auto", "chunk", "tiles", "recurrent", "naive")
HEADS, D, DV = 3, 5, 4
RATES = torch.tensor([0.0, 0.3, 6.5], dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def given(length, batch=2, heads=HEADS, kv_heads=HEADS, dtype=torch.float64):
    shapes = (batch, heads, length, D), (batch, kv_heads, length, D), (batch, kv_heads, length, DV)
    return tuple(normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))


def naively(q, k, v, rates, state=None):
    """The formula as three loops over one sequence after another."""
    out = v.new_zeros(*q.shape[:3], v.shape[3])
    states = v.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = states[b, h] if state is None else state[b, h]
            for i in range(q.shape[2]):
                s = math.exp(-rates[h]) * s + torch.outer(k[b, h, i], v[b, h, i])
                out[b, h, i] = q[b, h, i] @ s
            states[b, h] = s
    return out, states


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 250])
def test_every_method_is_the_formula(method, length):
    q, k, v = given(length)
    state = normal(2, HEADS, D, DV, seed=9)
    expected, last = naively(q, k, v, RATES, state)
    out, found = lightning_attention(q, k, v, RATES, initial_state=state, return_state=True, method=method)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(found, last, rtol=0, atol=1e-11)
    wrong = lightning_attention(q, k, v, 1.01 * RATES + 0.01, initial_state=state, method=method)
    assert length == 0 or (wrong - expected).abs().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 100])
@pytest.mark.parametrize("method", ["chunk", "tiles"])
def test_the_chunk_does_not_matter(chunk, method):
    q, k, v = given(250)
    expected = lightning_attention(q, k, v, RATES, method="naive")
    found = lightning_attention(q, k, v, RATES, chunk_size=chunk, method=method)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk", [4, 7])
@pytest.mark.parametrize("method", ["chunk", "tiles", "recurrent"])
def test_gradients_through_output_and_both_states(method, chunk):
    """Also those that are written by hand; the last tile is shorter than the others."""
    start = normal(2, HEADS, D, DV, seed=9)

    def gradients(method):
        leaves = [x.clone().requires_grad_() for x in (*given(17), start)]
        out, state = lightning_attention(
            *leaves[:3], RATES, initial_state=leaves[3], return_state=True, chunk_size=chunk, method=method
        )
        return torch.autograd.grad((out.sin().sum() + state.cos().sum()), leaves)

    for found, expected in zip(gradients(method), gradients("naive"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("method", ["chunk", "tiles", "naive"])
def test_gradcheck(method):
    leaves = [x[:1, :2].clone().requires_grad_() for x in given(9)]
    state = normal(1, 2, D, DV, seed=9).requires_grad_()

    def run(q, k, v, state):
        return lightning_attention(
            q, k, v, RATES[:2], initial_state=state, return_state=True, chunk_size=4, method=method
        )

    assert torch.autograd.gradcheck(run, (*leaves, state))


def test_rates_can_be_learned_by_autograd_and_not_by_tiles():
    q, k, v = given(20)
    grads = []
    for method in ("chunk", "recurrent", "naive"):
        rates = RATES.clone().requires_grad_()
        lightning_attention(q, k, v, rates, method=method, chunk_size=8).sin().sum().backward()
        grads.append(rates.grad)
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])
    with pytest.raises(RegardError, match="`tiles` has none"):
        lightning_attention(q, k, v, RATES.clone().requires_grad_(), method="tiles")


@pytest.mark.parametrize("method", METHODS)
def test_streaming_in_pieces_of_any_size(method):
    q, k, v = given(80)
    expected = lightning_attention(q, k, v, RATES, method="naive")
    outs, state, start = [], None, 0
    for size in (1, 0, 33, 45, 1):
        part = (x[:, :, start : start + size] for x in (q, k, v))
        out, state = lightning_attention(*part, RATES, initial_state=state, return_state=True, method=method)
        outs.append(out)
        start += size
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_packed_sequences_know_nothing_of_each_other(method):
    q, k, v = given(31, batch=1)
    bounds = [0, 4, 4, 5, 31]
    alone = [lightning_attention(*(x[:, :, a:b] for x in (q, k, v)), RATES, method="naive", return_state=True)
             for a, b in pairwise(bounds)]  # fmt: skip
    expected, states = torch.cat([out for out, _ in alone], 2), torch.cat([state for _, state in alone])
    for cu_seqlens in (bounds, torch.tensor(bounds, dtype=torch.int32)):
        out = lightning_attention(q, k, v, RATES, cu_seqlens=cu_seqlens, method=method, chunk_size=8)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    out, found = lightning_attention(q, k, v, RATES, cu_seqlens=bounds, method=method, return_state=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(found, states, rtol=0, atol=1e-11)
    again = lightning_attention(q, k, v, RATES, cu_seqlens=bounds, initial_state=found, method=method)
    assert (again - expected).abs().max() > 0.1
    first = lightning_attention(
        *(x[:, :, :4] for x in (q, k, v)), RATES, initial_state=found[:1], method="naive"
    )
    torch.testing.assert_close(again[:, :, :4], first, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_padding_neither_writes_nor_ages(method):
    q, k, v = given(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :3] = mask[0, 10:14] = mask[1, 25:] = False
    out, state = lightning_attention(
        q, k, v, RATES, mask=mask, return_state=True, method=method, chunk_size=8
    )
    for item in range(2):
        alone = [x[item : item + 1, :, mask[item]] for x in (q, k, v)]
        expected, last = lightning_attention(*alone, RATES, return_state=True, method="naive")
        torch.testing.assert_close(out[item : item + 1, :, mask[item]], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(state[item : item + 1], last, rtol=0, atol=1e-11)


def test_a_rate_belongs_to_its_query_head_where_keys_are_shared():
    q, k, v = given(20, heads=4, kv_heads=2)
    rates = torch.tensor([0.1, 0.5, 1.0, 2.0])
    expected = lightning_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), rates)
    torch.testing.assert_close(lightning_attention(q, k, v, rates, method="tiles"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_keeps_sums_in_float32(method):
    """A bfloat16 sum of 3000 ones would stop at 256."""
    ones = torch.ones(1, 1, 3000, 1, dtype=torch.bfloat16)
    out, state = lightning_attention(ones, ones, ones, None, return_state=True, method=method)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert state.item() == 3000 and abs(out[0, 0, -1, 0].item() - 3000) <= 8


@pytest.mark.parametrize("method", METHODS)
def test_autocast_lowers_no_sum(method):
    def run(lowered):
        leaves = [x.requires_grad_() for x in given(90, dtype=torch.float32)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            assert (leaves[0] @ leaves[1].mT).dtype == (torch.bfloat16 if lowered else torch.float32)
            out = lightning_attention(*leaves, RATES, method=method)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other)


def test_steep_rates_on_long_input_stay_finite():
    q, k, v = given(700, dtype=torch.float32)
    for method in METHODS[:3]:
        out = lightning_attention(q, k, v, decay_rates(3, kind="paper") * 3, method=method, chunk_size=512)
        assert torch.isfinite(out).all()


def test_nothing_of_the_size_of_all_pairs_is_made():
    """Neither forwards nor backwards."""
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            return out

    length = 4096
    for method in ("chunk", "tiles"):
        leaves = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
        with Sizes():
            lightning_attention(*leaves, [0.1], method=method).sum().backward()
        assert 0 < max(seen) < length * length / 16
        seen.clear()


def test_rates_of_the_three_formulas():
    """Written out for 8 heads; 6 heads take the slopes of 4 and every second one of 8."""
    assert decay_rates(8, 0, 24).tolist() == pytest.approx([(1 + 1e-5) * 2.0**-i for i in range(1, 9)])
    six = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert decay_rates(6, 0, 24).tolist() == pytest.approx([(1 + 1e-5) * s for s in six])
    assert decay_rates(6, 23, 24).tolist() == pytest.approx([1e-5 * s for s in six])
    assert decay_rates(1, 0, 1).tolist() == pytest.approx([2.0**-8 * (1 + 1e-5)])
    assert decay_rates(8, 0, 24, "paper").tolist() == list(range(8))
    assert decay_rates(8, 12, 24, "paper").tolist() == [h / 2 for h in range(8)]
    minimax = [2 ** (-8 * (h + 1) / 6) * (1 - 5 / (9 + 1e-5) + 1e-5) for h in range(6)]
    assert decay_rates(6, 5, 10, "minimax").tolist() == pytest.approx(minimax)
    assert decay_rates(4, kind="none").tolist() == [0] * 4


def test_the_mechanism_takes_its_rates_from_the_layer_or_by_hand():
    q, k, v = given(12, heads=2, kv_heads=2)
    for spec, rates in (
        (LightningAttention(), decay_rates(2)),
        (get("lightning-attention", rates="paper", layer=1, layers=4), decay_rates(2, 1, 4, "paper")),
        (LightningAttention(rates=[0.2, 0.7]), [0.2, 0.7]),
    ):
        torch.testing.assert_close(spec.build()(q, k, v), lightning_attention(q, k, v, rates))
    assert LightningAttention(rates=[0.2, 0.7]) == LightningAttention(rates=(0.2, 0.7))


def test_a_layer_or_a_model_tells_the_mechanism_where_it_stands():
    made = MultiHeadAttention(12, 3, mechanism=LightningAttention(rates="paper"), layer=2, layers=5)
    expected = decay_rates(3, 2, 5, "paper")
    torch.testing.assert_close(made.mechanism.rates_of(3, torch.device("cpu")), expected)
    x = torch.randn(2, 9, 12)
    first, state = made.step(x[:, :5])
    torch.testing.assert_close(torch.cat([first, made.step(x[:, 5:], state)[0]], 1), made(x))
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=8, num_hidden_layers=4, num_attention_heads=3
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 50, (2, 9))
    with regard.swap(model, LightningAttention(rates="paper")) as swapped:
        found = [m.rates_of(3, torch.device("cpu")) for m in swapped.mechanisms.values()]
        for layer, rates in enumerate(found):
            torch.testing.assert_close(rates, decay_rates(3, layer, 4, "paper"))
        asked = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **asked), model.generate(ids, use_cache=False, **asked))


def test_it_is_its_linear_system_with_padding_too():
    q, k, v = given(14, heads=4, kv_heads=2)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :2] = mask[0, 6:8] = False
    spec = LightningAttention(rates="paper")
    assert oracle_error(spec, (q, k, v)) < 1e-12
    assert oracle_error(spec, (q, k, v, Context.of(q, k, valid=mask))) < 1e-12


Q, K, V = given(6)
STATE = torch.zeros(2, HEADS, D, DV, dtype=torch.float64)
PACKED = [x[:1] for x in (Q, K, V)]


@pytest.mark.parametrize(
    ("given", "options", "kind", "told"),
    [
        ((Q, K, V, [0.1, -0.2, 0.1]), {}, RegardError, "rates has -0.2"),
        ((Q, K, V, [0.1, float("nan"), 0.1]), {}, RegardError, "rates has nan"),
        ((Q, K, V, [0.1, 0.1]), {}, ShapeMismatch, "each of 3 heads"),
        ((Q, K, V, "alibi"), {}, RegardError, "decay_rates"),
        ((Q.long(), K, V, RATES), {}, ShapeMismatch, "q must be floating-point .* int64"),
        ((Q, K, V[0], RATES), {}, ShapeMismatch, "v must be floating-point"),
        ((Q, K[..., 1:], V, RATES), {}, ShapeMismatch, "q and k in dim"),
        ((Q, K[:, :2], V[:, :2], RATES), {}, ShapeMismatch, "no multiple of the 2"),
        ((Q, K.masked_fill(K > 2, math.nan), V, RATES), {}, RegardError, "k has numbers that are not finite"),
        ((Q, K, V, RATES), {"chunk_size": 0}, RegardError, "chunk_size is 0"),
        ((Q, K, V, RATES), {"method": "flash"}, RegardError, "auto, chunk, tiles, recurrent, naive"),
        ((Q, K, V, RATES), {"initial_state": STATE[..., 1:]}, ShapeMismatch, r"must be \[2, 3, 5, 4\]"),
        ((Q, K, V, RATES), {"initial_state": STATE.float()}, ShapeMismatch, "must be float64"),
        ((Q, K, V, RATES), {"initial_state": STATE.to("meta")}, ShapeMismatch, "on meta"),
        ((Q, K, V, RATES), {"mask": torch.ones(2, 5).bool()}, ShapeMismatch, r"bool \[2, 6\]"),
        ((Q, K, V, RATES), {"mask": torch.ones(2, 6)}, ShapeMismatch, "is float32"),
        ((Q, K, V, RATES), {"mask": torch.zeros(2, 1, 6, 6)}, RegardError, "cannot honour an arbitrary mask"),
        ((Q, K, V, RATES), {"cu_seqlens": [0, 6]}, ShapeMismatch, "batch of one"),
        ((*PACKED, RATES), {"cu_seqlens": [0, 4, 3, 6]}, RegardError, "never fall"),
        ((*PACKED, RATES), {"cu_seqlens": [0, 4]}, RegardError, "end with 6"),
        ((*PACKED, RATES), {"cu_seqlens": [0.0, 6.0]}, RegardError, "whole numbers"),
        ((*PACKED, RATES), {"cu_seqlens": [0, 6], "mask": Q[:1, 0, :, 0] > 9}, RegardError, "both given"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(given, options, kind, told):
    with pytest.raises(kind, match=told):
        lightning_attention(*given, **options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: decay_rates(4, 3, 3), "layer is 3, and there are 3"),
        (lambda: decay_rates(0), "heads is 0"),
        (lambda: decay_rates(4, kind="slope"), "alibi, minimax, paper, none"),
        (lambda: LightningAttention(rates="slope"), "alibi, minimax"),
        (lambda: LightningAttention(rates=[-1.0]), "rates has -1"),
        (lambda: LightningAttention(layer=2, layers=2), "layer is 2"),
        (lambda: LightningAttention(chunk_size=0), "chunk_size is 0"),
        (lambda: LightningAttention(rates=[0.1]).build()(Q, K, V), "each of 3 heads"),
        (lambda: LightningAttention().build()(Q, K, V, Context.of(Q, K, causal=False)), "no causal order"),
        (
            lambda: LightningAttention().build().step(Q, K, V, (STATE[:, :, 1:],)),
            r"the state is \[2, 3, 4, 4\]",
        ),
    ],
)
def test_wrong_options_are_refused(make, told):
    with pytest.raises(RegardError, match=told):
        make()
