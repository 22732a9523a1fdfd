"""Softplus attention: the seven steps in a loop over rows, counts under every mask, traps, and refusals."""

import math

import pytest
import torch

import regard
from regard.attention import LSSA, LSSAR, Context, MultiHeadAttention, get
from regard.attention.softplus import (
    SoftplusAttentionHeads,
    l1_normalise,
    reweight,
    softplus_attention,
)
from regard.attention.visible import visible_keys
from regard.engines import reshaped
from regard.engines.masks import CausalMask, TensorMask, WindowMask
from regard.errors import RegardError, ShapeMismatch
from tests.attention.models import generated, outputs, prompt
from tests.support.families import FAMILIES


def drawn(length, keys=None, *, batch=1, heads=1, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + length)
    shapes = [(batch, heads, n, d) for n, d in ((length, dim), (keys or length, dim), (keys or length, 3))]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def by_the_steps(q, k, v, visible, p=None, f=lambda z: math.log1p(math.exp(z))):
    """Steps 1 to 7 for one head, row by row and key by key, float64, with no safe form."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if visible[i][j]]
        m = len(seen)
        scale = math.log(q.shape[1]) * math.log(m) if m else 0.0
        z = [scale * float((q[i] / q[i].norm()) @ (k[j] / k[j].norm())) for j in seen]
        a = [f(x) for x in z]
        a = [x / sum(a) for x in a]
        if p is not None:
            a = [max(0.0, m * x - (1.0 if m > 3 else 0.0)) ** p for x in a]
            a = [x / sum(a) for x in a]
        for j, x in zip(seen, a, strict=True):
            out[i] += x * v[j]
    return out


@pytest.mark.parametrize("p", [None, 0.5, 1, 3, 15, 2.5])
@pytest.mark.parametrize("impl", ["rows", "matrix"])
def test_it_is_the_seven_steps(p, impl):
    q, k, v = drawn(23)
    found = softplus_attention(q, k, v, causal=True, reweight=p, impl=impl)[0, 0]
    expected = by_the_steps(q[0, 0], k[0, 0], v[0, 0], torch.ones(23, 23).tril(), p)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_with_exp_it_is_softmax_of_the_same_scores():
    q, k, v = drawn(19)
    found = softplus_attention(q, k, v, causal=True, activation="exp")
    scale = math.log(8) * torch.arange(1.0, 20, dtype=torch.float64).log()[:, None]
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        unit[0] * scale, unit[1], v, is_causal=True, scale=1
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - softplus_attention(q, k, v, causal=True)).abs().max() > 1e-2


WINDOW = torch.ones(12, 12).tril().bool() & ~torch.ones(12, 12).tril(-5).bool()
HOLES = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) > 0.4


@pytest.mark.parametrize(
    "mask", [WINDOW, HOLES, HOLES.clone().fill_diagonal_(True).tril()], ids=["window", "holes", "low"]
)
@pytest.mark.parametrize("p", [None, 3])
def test_counts_are_of_what_a_row_may_see(mask, p):
    q, k, v = drawn(12)
    expected = by_the_steps(q[0, 0], k[0, 0], v[0, 0], mask, p)
    additive = torch.zeros(12, 12, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    for given in (mask, additive, mask[None, None]):
        found = softplus_attention(q, k, v, mask=given, reweight=p)[0, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    both = softplus_attention(q, k, v, mask=mask, causal=True, reweight=p)[0, 0]
    expected = by_the_steps(q[0, 0], k[0, 0], v[0, 0], mask.tril(), p)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-12)


def test_visible_keys_under_padding_offset_and_windows():
    q, k, _ = drawn(4, 9, batch=2)
    valid = torch.ones(2, 9).bool()
    valid[0, :3] = False
    ctx = Context.of(q, k, valid=valid)
    assert visible_keys(ctx, q, k)[:, 0].tolist() == [[3, 4, 5, 6], [6, 7, 8, 9]]
    assert visible_keys(Context.of(q, k), q, k).flatten().tolist() == [6, 7, 8, 9]
    full = Context.of(q, k, causal=False, valid=valid)
    assert visible_keys(full, q, k)[:, 0].tolist() == [[6] * 4, [9] * 4]
    narrow = Context(mask=WindowMask(CausalMask(4, 9, 5), 3, 5), offset=5, plain=False)
    assert visible_keys(narrow, q, k).flatten().tolist() == [3, 3, 3, 3]


def test_a_padded_batch_in_training_and_a_query_at_a_time_are_the_whole():
    q, k, v = drawn(21, batch=2, heads=2)
    whole = softplus_attention(q, k, v, causal=True, reweight=15)
    for i in range(21):
        now = softplus_attention(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], causal=True, reweight=15, query_offset=i
        )
        torch.testing.assert_close(now, whole[:, :, i : i + 1])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_overflows_or_vanishes_at_great_lengths(grad, dtype):
    """(m - 1)^15 at 5000 keys is beyond float32; the sum of a small constant would swallow the rest."""
    q, k, v = drawn(2, 5000, dim=64, dtype=dtype)
    k[:, :, 7] = 40 * q[:, :, 1]
    q.requires_grad_(grad)
    out = softplus_attention(q, k, v, causal=True, reweight=15.0, query_offset=4998)
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 7], rtol=2e-2, atol=1e-3)
    weights = LSSAR().build().matrix(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_rows_without_differences_stay_uniform_and_are_counted(grad):
    q, k, v = drawn(40, batch=2, dtype=torch.float32)
    k[1] = k[1, :, :1]
    attention = LSSAR().build()
    given = [x.clone().requires_grad_(grad) for x in (q, k, v)]
    out = attention(*given)
    assert attention.uniform_rows == 37, "rows of more than three keys"
    means = v[1, 0].cumsum(0) / torch.arange(1.0, 41)[:, None]
    torch.testing.assert_close(out[1, 0], means, rtol=1e-4, atol=1e-5)
    attention(q[:1], k[:1], v[:1])
    assert attention.uniform_rows == 0
    if grad:
        out.sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in given)


def test_rows_of_zeros_and_rows_that_see_nothing():
    q, k, v = drawn(9)
    q[:, :, 5], k[:, :, 2] = 0, 0
    given = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.ones(9, 9).tril().bool()
    mask[7] = False
    for p in (None, 0.5, 15):
        out = softplus_attention(*given, mask=mask, reweight=p)
        torch.testing.assert_close(out[0, 0, 5], v[0, 0, :6].mean(0))
        assert torch.equal(out[0, 0, 7], torch.zeros(3, dtype=torch.float64))
        grads = torch.autograd.grad(out.sin().sum(), given)
        assert all(torch.isfinite(g).all() and g.abs().max() < 1e3 for g in grads)


@pytest.mark.parametrize("way", ["softmax", "sigmoid", "relu"])
def test_building_blocks_reweight_any_attention(way):
    scores = drawn(12)[0][0, 0] @ drawn(12)[1][0, 0].T
    f = {"softmax": torch.exp, "sigmoid": torch.sigmoid, "relu": torch.relu}[way]
    weights = l1_normalise(f(scores).tril())
    counts = torch.arange(1, 13)
    found = reweight(weights, counts, 3)
    for i, row in enumerate(weights):
        x = (row * (i + 1) - float(i >= 3)).clamp(min=0) ** 3
        expected = x / x.sum() if x.sum() > 0 else row
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)
    assert (found > 0).sum() < (weights > 0).sum()


def test_power_depends_on_training(monkeypatch):
    monkeypatch.setattr(reshaped, "MIN_ROWS", 2)
    monkeypatch.setattr(reshaped, "MAX_ROWS", 4)
    q, k, v = drawn(15)
    attention = LSSAR(p_train=3.0, p_eval=15.0).build()
    for training, p in ((True, 3.0), (False, 15.0)):
        expected = softplus_attention(q, k, v, causal=True, reweight=p)
        torch.testing.assert_close(attention.train(training)(q, k, v), expected)
    plain = LSSAR(p_train=None).build()(q, k, v)
    torch.testing.assert_close(plain, LSSA().build()(q, k, v))


@pytest.mark.parametrize("spec", [LSSA(), LSSAR()], ids=repr)
@pytest.mark.parametrize("name", ["llama", "qwen3", "bart"])
def test_swapped_in_it_generates_as_it_computes(name, spec):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    with regard.swap(model, spec):
        for way in ({}, {"num_beams": 2}):
            expected, scores = generated(model, inputs, use_cache=False, **way)
            found, others = generated(model, inputs, **way)
            assert torch.equal(found, expected)
            torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)


def test_a_swap_counts_behind_left_padding():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model, "left")
    valid = inputs["attention_mask"]
    inputs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
    with regard.swap(model, LSSAR()):
        whole = outputs(model, inputs)
        for item in range(2):
            mask = valid[item].bool()
            alone = outputs(model, {"input_ids": inputs["input_ids"][item : item + 1, mask]})
            torch.testing.assert_close(whole[item][mask], alone[0], rtol=1e-4, atol=1e-4)


def test_a_layer_trains_with_it():
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, mechanism="lssar", positions="rotary")
    x = torch.randn(4, 20, 16)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (layer(x)[:, 1:] - x[:, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


Q, K, V = drawn(6, batch=2, heads=2)
ALIBI = -0.5 * torch.arange(6.0)[:, None].sub(torch.arange(6.0)).clamp(min=0)


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: softplus_attention(Q, K, V, reweight=0), RegardError, "is 0; it must be a number above 0"),
        (lambda: LSSAR(p_eval=-1.0), RegardError, "p_eval is -1.0"),
        (lambda: LSSAR(p_train=math.inf), RegardError, "p_train is inf"),
        (lambda: LSSA(activation="gelu"), RegardError, "'gelu'; it must be one of softplus, exp"),
        (lambda: reweight(torch.ones(1, 2) / 2, torch.tensor([2]), 0), RegardError, "p is 0"),
        (lambda: softplus_attention(Q, K, V, impl="sdpa"), RegardError, "needs the whole row"),
        (lambda: softplus_attention(Q, K, V, impl="flash"), RegardError, "needs the whole row"),
        (
            lambda: softplus_attention(Q, K, V, mask=ALIBI),
            RegardError,
            "the mask adds -0.5 .* 0 and -inf alone",
        ),
        (lambda: softplus_attention(Q, K, V, mask=HOLES), ShapeMismatch, "mask must be"),
        (lambda: softplus_attention(Q, K, V, query_offset=2), RegardError, "without causal=True"),
        (lambda: softplus_attention(Q, K, V, causal=True, query_offset=1), ShapeMismatch, "need 7 keys"),
        (lambda: softplus_attention(Q, K[:, :, :4], V), ShapeMismatch, "v .B, Hkv, S, Dv"),
        (lambda: softplus_attention(Q / 0, K, V), RegardError, "q holds"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def test_a_position_bias_or_sink_logits_are_refused():
    base = Context.of(Q, K)
    for extra, told in (
        ({"bias": torch.zeros(1, 1, 6, 6)}, "a position bias"),
        ({"sink_logits": torch.zeros(2)}, "sink logits"),
        ({"softcap": 30.0}, "a soft-cap"),
    ):
        with pytest.raises(RegardError, match=told):
            LSSA().build()(Q, K, V, Context(mask=base.mask, **extra))
    additive = TensorMask(ALIBI[None, None], 6, 6)
    with pytest.raises(RegardError, match="the mask adds"):
        LSSAR().build()(Q, K, V, Context(mask=additive, causal=False, plain=False))


def test_names():
    assert get("lssar", p_train=3.0) == LSSAR(p_train=3.0) and get("lssa") == LSSA()
    assert isinstance(LSSA().build(), SoftplusAttentionHeads) and LSSA().build().power is None
