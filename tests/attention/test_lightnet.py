"""LightNet's recurrence: every form is the sum as written, whatever the keys; packing, padding, errors."""

from itertools import pairwise

import pytest
import torch

from regard.attention import Context, LightNet, get
from regard.attention.dsf import assert_equivalent, oracle_error, to_ltv
from regard.attention.dsf.rows import lightnet as row
from regard.attention.lightnet import MDLRPE, additive, lightnet_attention
from regard.attention.lightnet import function as functions
from regard.errors import RegardError, ShapeMismatch

BATCH, HEADS, DIM, VALUES = 2, 2, 5, 3


def given(length, keys=1.0, heads=HEADS, dtype=torch.float64, seed=0):
    """q, k, v with keys so many times normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, heads, length, DIM), (BATCH, HEADS, length, DIM), (BATCH, HEADS, length, VALUES)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.to(dtype), (keys * k).to(dtype), v.to(dtype)


def by_hand(q, k, v):
    """The formula at every position, with softmax over time; no other code."""
    return torch.stack(
        [
            q[:, :, t, None] @ (k[:, :, : t + 1].softmax(2).transpose(-1, -2) @ v[:, :, : t + 1])
            for t in range(q.shape[2])
        ],
        2,
    )[:, :, :, 0]


def near(found, expected, bound=1e-12):
    assert found.shape == expected.shape and torch.isfinite(found).all()
    assert not found.numel() or (found.double() - expected).abs().max() <= bound * max(
        1.0, expected.abs().max()
    )


@pytest.mark.parametrize("keys", [1, 10, 80, 1000])
@pytest.mark.parametrize("method", ["chunk", "safe", "recurrent", "naive"])
def test_every_form_is_the_sum_as_written(method, keys):
    for length in (1, 2, 130, 300):
        q, k, v = given(length, keys)
        near(lightnet_attention(q, k, v, causal=True, method=method)[0], by_hand(q, k, v), 2e-12)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "one far above"])
def test_keys_of_any_size_in_any_order(order, monkeypatch):
    q, k, v = given(600, 80)
    if order != "random":
        k = k.sort(2, descending=order == "falling").values
    if order == "one far above":
        k = torch.where(torch.arange(600)[:, None] == 311, 5000.0, k / 80)
    expected = by_hand(q, k, v)
    near(lightnet_attention(q, k, v, causal=True)[0], expected)
    single = lightnet_attention(*(x.float() for x in (q, k, v)), causal=True)[0]
    near(single, by_hand(*(x.float().double() for x in (q, k, v))), 5e-5)
    kept = []
    monkeypatch.setattr(
        additive, "decaying", lambda piece, state: kept.append(piece.length) or zeros(piece, state)
    )
    lightnet_attention(*(x.float() for x in (q, k, v)), causal=True)
    assert bool(kept) == (order != "falling"), "decays are left out where that is not safe, or never"


def zeros(piece, state):
    return piece.q.new_zeros(*piece.q.shape[:3], piece.v.shape[3]), state


@pytest.mark.parametrize("keys", [10, 80])
def test_without_its_guard_the_fast_form_is_wrong(keys, monkeypatch):
    """The control at keys x 80: decays left out everywhere give numbers that are wrong or not finite."""
    monkeypatch.setattr(additive, "GROWTH", dict.fromkeys(additive.GROWTH, float("inf")))
    q, k, v = given(600, keys, dtype=torch.float32)
    found = lightnet_attention(q, k, v, causal=True)[0]
    expected = by_hand(*(x.double() for x in (q, k, v)))
    with pytest.raises(AssertionError):
        near(found, expected, 5e-5)


def test_ordinary_keys_need_no_decays(monkeypatch):
    monkeypatch.setattr(additive, "decaying", None)
    q, k, v = given(2100, dtype=torch.float32)
    near(lightnet_attention(q, k, v, causal=True)[0], by_hand(*(x.double() for x in (q, k, v))), 1e-5)


@pytest.mark.parametrize("keys", [1, 80])
@pytest.mark.parametrize("method", ["chunk", "safe"])
def test_gradients_are_those_of_the_sum(method, keys):
    q, k, v = (x.requires_grad_() for x in given(270, keys))
    valid = torch.ones(BATCH, 270, dtype=torch.bool)
    valid[0, :7] = valid[1, 200:230] = False
    grads = []
    for way in (method, "naive"):
        out, (S, z) = lightnet_attention(q, k, v, causal=True, valid=valid, method=way)
        loss = (out * valid[:, None, :, None]).sin().sum() + S.cos().sum() + z.tanh().sum()
        grads.append(torch.autograd.grad(loss, (q, k, v)))
    for found, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 0.1
        near(found, expected, 1e-10)


def test_gradients_in_float32_with_wide_keys():
    q, k, v = given(600, 20, dtype=torch.float32)
    found, expected = (
        torch.autograd.grad(lightnet_attention(q_, k_.requires_grad_(), v_, causal=True)[0].sin().sum(), k_)[
            0
        ]
        for q_, k_, v_ in ((q, k, v), (x.double() for x in (q, k, v)))
    )
    near(found, expected, 1e-4)


@pytest.mark.parametrize("keys", [1, 80])
def test_the_last_causal_row_is_that_of_all_directions(keys):
    q, k, v = given(140, keys)
    causal, last = lightnet_attention(q, k, v, causal=True)
    whole, after = lightnet_attention(q, k, v, causal=False)
    near(causal[:, :, -1], whole[:, :, -1])
    for one, other in zip(last, after, strict=True):
        near(one, other)
    near(whole, q @ (k.softmax(2).transpose(-1, -2) @ v))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_and_keys_of_minus_infinity_write_nothing(side):
    q, k, v = given(200)
    valid = torch.ones(BATCH, 200, dtype=torch.bool)
    valid[0, {"left": slice(0, 150), "right": slice(70, 200), "middle": slice(40, 170)}[side]] = False
    valid[1] = side != "left"
    dead = ~valid[:, None, :, None]
    for causal in (True, False):
        found, state = lightnet_attention(q, k, v, causal=causal, valid=valid)
        for item in range(BATCH):
            alone = [x[item : item + 1, :, valid[item]] for x in (q, k, v)]
            out, (S, _) = lightnet_attention(*alone, causal=causal)
            near(found[item : item + 1, :, valid[item]], out)
            near(state[0][item : item + 1], S)
        other, same = lightnet_attention(q, k.masked_fill(dead, -torch.inf), v, causal=causal)
        near(other.transpose(1, 2)[valid], found.transpose(1, 2)[valid])
        near(same[1], state[1])
    if side == "left":
        assert not lightnet_attention(q, k, v, causal=True, valid=valid)[0][1].any(), "a row that sees no key"


def test_a_channel_without_keys_counts_nothing():
    q, k, v = given(300)
    k = k.clone()
    k[:, :, :200, 2] = -torch.inf
    expected = by_hand(q, torch.where(k == -torch.inf, -1e6, k), v)
    only = torch.arange(DIM) != 2
    expected[:, :, :200] = by_hand(q[..., only], k[..., only], v)[:, :, :200]
    for method in ("chunk", "safe", "recurrent", "naive"):
        near(lightnet_attention(q, k, v, causal=True, method=method)[0], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_see_themselves_alone(causal):
    q, k, v = given(40, 10, heads=4)
    starts = torch.zeros(BATCH, 40, dtype=torch.bool)
    starts[0, [0, 7, 8, 30]] = starts[1, 21] = True
    found, state = lightnet_attention(q, k, v, causal=causal, starts=starts)
    for item, cuts in ((0, [0, 7, 8, 30, 40]), (1, [0, 21, 40])):
        for a, b in pairwise(cuts):
            alone = [x[item : item + 1, :, a:b] for x in (q, k, v)]
            out, last = lightnet_attention(*alone, causal=causal)
            near(found[item : item + 1, :, a:b], out)
        near(state[0][item : item + 1], last[0])
    if causal:
        _, before = lightnet_attention(q, k, v, causal=True)
        late, _ = lightnet_attention(q, k, v, causal=True, starts=starts, state=before)
        near(late[0], found[0])
        on = lightnet_attention(q, k, v, causal=True, state=before)[0]
        near(late[1, :, :21], on[1, :, :21])
        near(late[1, :, 21:], found[1, :, 21:])


def test_angles_make_the_weights_depend_on_the_distance():
    q, k, v = given(12)
    pe = MDLRPE(DIM, HEADS, 1).double()
    places = torch.arange(12)[:, None]
    apart = (places.T - places)[..., None] * pe.theta[:, None, None]
    for t in range(12):
        shares = k[:, :, : t + 1].softmax(2) * apart[:, t, : t + 1].cos()
        expected = torch.einsum("bhc,bhsc,bhsd->bhd", q[:, :, t], shares, v[:, :, : t + 1])
        for method in ("chunk", "safe", "recurrent", "naive"):
            found, _ = lightnet_attention(q, k, v, causal=True, angles=pe(places), method=method)
            near(found[:, :, t], expected)
    moved, _ = lightnet_attention(q, k, v, causal=True, angles=pe(places + 1000))
    near(moved, lightnet_attention(q, k, v, causal=True, angles=pe(places))[0], 1e-9)


def test_a_scan_sees_the_other_way_only_without_order():
    q, k, v = (x.requires_grad_() for x in given(9))
    reach = {}
    for causal in (True, False):
        out, _ = lightnet_attention(q, k, v, causal=causal)
        reach[causal] = torch.autograd.grad(out[:, :, 0].sum(), v)[0][:, :, -1].abs().max()
    assert reach[True] == 0 and reach[False] > 1e-3


@pytest.mark.parametrize("spec", LightNet.examples(), ids=repr)
def test_it_is_the_system_of_its_row(spec):
    q, k, v = (x[:1] for x in given(17))
    assert oracle_error(spec, (q, k, v)) < 1e-12
    if spec.preset == "paper":
        queries = torch.nn.functional.silu(q)
        assert_equivalent(to_ltv(spec, (q, k, v))[0], row(queries, k, VALUES))


def test_presets_differ_as_they_say():
    q, k, v = given(9)
    outs = {
        name: LightNet(preset=name, activation="none").build()(q, k, v)
        for name in ("paper", "fla", "xmixers")
    }
    near(outs["fla"], outs["paper"] * DIM**-0.5)
    more = 1 / (1 + (-k.logcumsumexp(2)).exp())
    expected = torch.stack([(q[:, :, t] * more[:, :, t])[:, :, None] for t in range(9)], 2)[:, :, :, 0]
    near(outs["xmixers"], by_hand(expected, k, v))
    assert get("lightnet", preset="fla") == LightNet(preset="fla")


def test_the_state_has_the_same_size_however_long_the_past():
    attention = LightNet().build()
    sizes = set()
    for length in (1, 300):
        q, k, v = given(length, dtype=torch.bfloat16)
        _, state = attention.step(q, k, v, None, Context.of(q, k))
        sizes.add(tuple((tuple(x.shape), x.dtype) for x in state))
    assert sizes == {(((2, 2, DIM, VALUES), torch.float32), ((2, 2, DIM), torch.float32))}


q, k, v = given(6)
S, z = lightnet_attention(q, k, v, causal=True)[1]


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: lightnet_attention(q, k, v, causal=False, state=(S, z)), RegardError, "without causal"),
        (lambda: lightnet_attention(q, k, v, causal=True, state=(S,)), ShapeMismatch, "pair"),
        (lambda: lightnet_attention(q, k, v, causal=True, state=(S, z[:1])), ShapeMismatch, "z of the state"),
        (lambda: lightnet_attention(q, k, v, causal=True, state=(S.float(), z)), ShapeMismatch, "float64"),
        (lambda: lightnet_attention(q[:, :, :5], k, v, causal=True), ShapeMismatch, "as many"),
        (lambda: lightnet_attention(q, k[..., :4], v, causal=True), ShapeMismatch, "agree"),
        (lambda: lightnet_attention(q[0], k, v, causal=True), ShapeMismatch, "q must be floating-point"),
        (lambda: lightnet_attention(q[:, :1], k, v, causal=True), ShapeMismatch, "no multiple"),
        (lambda: lightnet_attention(q, k, v, causal=True, method="fast"), RegardError, "method is 'fast'"),
        (lambda: lightnet_attention(q, k * torch.nan, v, causal=True), RegardError, "k holds NaN"),
        (lambda: lightnet_attention(q, k - k.log(), v, causal=True), RegardError, "k holds NaN or inf"),
        (lambda: lightnet_attention(q / 0, k, v, causal=False), RegardError, "q holds NaN or infinity"),
        (lambda: lightnet_attention(q, k, v, causal=True, valid=torch.ones(2, 6)), ShapeMismatch, "valid"),
        (lambda: lightnet_attention(q, k, v, causal=True, starts=z[:, 0] > 0), ShapeMismatch, "starts"),
        (lambda: lightnet_attention(q, k, v, causal=True, angles=(z, z)), ShapeMismatch, "cosines"),
        (lambda: LightNet(preset="theirs"), RegardError, "preset is 'theirs'"),
        (lambda: LightNet(activation="relu"), RegardError, "activation is 'relu'"),
        (lambda: LightNet().build().step(q, k, v, (S,)), ShapeMismatch, "pair"),
        (lambda: LightNet().build().step(q, k, v, (S, z.float())), ShapeMismatch, "z of the state"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def test_the_limits_leave_room_in_the_exponent():
    """g is divided by twice in a gradient, so exp(2 GROWTH) has to be a number."""
    for kind, growth in additive.GROWTH.items():
        assert torch.tensor(2.0 * growth, dtype=kind).exp() * 1e10 < torch.finfo(kind).max
        assert additive.LEAST[kind] < torch.tensor(-growth, dtype=kind).exp() * torch.finfo(kind).eps
    assert set(functions.METHODS) == {"chunk", "safe", "recurrent", "naive"}
