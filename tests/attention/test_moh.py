"""Mixture of heads: the router's gates, the layer around it, its losses and its refusals."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.attention import (
    HeadRouter,
    MixtureOfHeads,
    MoHAttention,
    MultiHeadAttention,
    balance_loss,
    head_usage,
    moh_attention,
)
from regard.engines import chosen as engine
from regard.errors import NothingObserved, RegardError, ShapeMismatch

SPLITS = [(9, 4, 3), (9, 4, 5), (8, 0, 3), (8, 1, 3), (8, 8, 0), (5, 4, 1), (1, 1, 0), (2, 0, 1)]
each = pytest.mark.parametrize(("heads", "shared", "active"), SPLITS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(heads, shared, active, **options):
    torch.manual_seed(1)
    return HeadRouter(16, heads, shared, active, **options)


@each
def test_learned_gates_are_the_formula(heads, shared, active):
    router, x = made(heads, shared, active), drawn(2, 7, 16)
    gates, routed = router(x), heads - shared
    for b in range(2):
        for t in range(7):
            own, expected = x[b, t], []
            if shared:
                weights = torch.ones(1) if shared == 1 else (router.share.weight @ own).softmax(0)
                expected.append(shared * weights)
            if routed:
                p = (router.route.weight @ own).softmax(0)
                top = sorted(range(routed), key=lambda i: -p[i].item())[:active]
                kept = torch.stack([p[i] if i in top else 0 * p[i] for i in range(routed)])
                expected.append(active * kept / kept.sum())
            if shared and routed:
                a = 2 * (router.split.weight @ own).softmax(0)
                expected = [a[0] * expected[0], a[1] * expected[1]]
                torch.testing.assert_close(gates[b, t].sum(), a[0] * shared + a[1] * active)
            torch.testing.assert_close(gates[b, t], torch.cat(expected))
    assert ((gates != 0).sum(-1) == shared + active).all()


def test_the_papers_gates_sum_to_one_at_most():
    x = drawn(2, 7, 16)
    official, paper = made(8, 2, 3), made(8, 2, 3, preset="paper")
    p, whole = paper.route(x).softmax(-1), official(x)
    a = paper.split(x).softmax(-1)
    gates = paper(x)
    torch.testing.assert_close(gates[..., :2], a[..., :1] * paper.share(x).softmax(-1))
    torch.testing.assert_close(gates[..., 2:], a[..., 1:] * p * (gates[..., 2:] != 0))
    assert (gates.sum(-1) < 1).all() and torch.equal(gates != 0, whole != 0)
    torch.testing.assert_close(whole[..., :2], 4 * gates[..., :2])


@each
def test_gates_of_a_trained_model_begin_at_one(heads, shared, active):
    gates = made(heads, shared, active, fine_tune=True)(drawn(2, 7, 16))
    torch.testing.assert_close(gates[gates != 0], torch.ones_like(gates[gates != 0]))
    assert ((gates != 0).sum(-1) == shared + active).all()
    if active == heads - shared:
        torch.testing.assert_close(gates, torch.ones(2, 7, heads))


@each
@pytest.mark.parametrize("kind", ["query_norm", "output_norm"])
def test_norms_choose_the_longest(kind, heads, shared, active):
    router, y = made(heads, shared, active, kind=kind).eval(), drawn(2, heads, 7, 4)
    gates = router(queries=y, outputs=y)
    assert not list(router.parameters()) and set(gates.unique().tolist()) <= {0.0, 1.0}
    assert (gates[..., :shared] == 1).all() and (gates.sum(-1) == shared + active).all()
    if 0 < active < heads - shared:
        norms = y.norm(dim=-1).transpose(1, 2)[..., shared:]
        on = gates[..., shared:] == 1
        assert (norms.masked_fill(~on, 9).amin(-1) > norms.masked_fill(on, 0).amax(-1)).all()


def test_the_straight_through_gradient_is_the_soft_one():
    router, q = made(6, 2, 2, kind="query_norm"), drawn(1, 6, 5, 4).requires_grad_()
    weight = drawn(1, 5, 6, seed=3)
    norms = q[:, 2:].norm(dim=-1).transpose(1, 2)
    soft = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    (expected,) = torch.autograd.grad((soft * weight[..., 2:]).sum(), q)
    (found,) = torch.autograd.grad((router(queries=q) * weight).sum(), q)
    torch.testing.assert_close(found, expected)
    assert found[:, 2:].abs().amin((2, 3)).gt(0).all() and not found[:, :2].any()
    assert not router.eval()(queries=q).requires_grad


def test_equal_scores_choose_the_first_and_equal_norms_are_no_nan():
    router = made(6, 2, 2, kind="query_norm")
    q = torch.ones(1, 6, 3, 4, requires_grad=True)
    gates = router(queries=q)
    assert gates[0, 0].tolist() == [1, 1, 1, 1, 0, 0]
    gates.sum().backward()
    assert q.grad.isfinite().all()
    one = made(3, 2, 1, kind="query_norm")
    assert one(queries=torch.ones(1, 3, 3, 4)).eq(1).all()


def test_random_heads_differ_by_token_and_are_as_many():
    gates = made(8, 2, 3, kind="random")(drawn(4, 50, 16))
    assert (gates.sum(-1) == 5).all() and len(gates.flatten(0, 1).unique(dim=0)) > 15
    torch.testing.assert_close(gates[..., 2:].mean((0, 1)), torch.full((6,), 0.5), atol=0.12, rtol=0)


def test_balance_is_the_formula_and_leaves_padding_out():
    torch.manual_seed(0)
    layer, x = MoHAttention(16, 8, 2, 3), drawn(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4] = False
    layer(x, valid)
    rows = x[valid]
    p = layer.router.route(rows).softmax(-1)
    used = (layer.router(rows[None])[0, :, 2:] != 0).float().mean(0)
    layer(x, valid)
    loss = balance_loss(layer)
    torch.testing.assert_close(loss, 6 * (p.mean(0) * used).sum())
    assert 2.5 < loss.item() < 4
    loss.backward()
    assert layer.router.route.weight.grad.any() and layer.router.share.weight.grad is None
    with pytest.raises(RegardError, match="since the last call"):
        balance_loss(layer)
    layer.eval()(x)
    with pytest.raises(RegardError, match="training mode"):
        balance_loss(layer)
    with pytest.raises(RegardError, match="no router"):
        balance_loss(torch.nn.Linear(3, 3))


def test_balance_pulls_towards_even_use():
    torch.manual_seed(0)
    router, x = HeadRouter(16, 6, 0, 2), drawn(1, 200, 16) + 1
    optimiser = torch.optim.Adam(router.parameters(), 0.05)
    before = balance_after(router, x)
    for _ in range(60):
        optimiser.zero_grad()
        balance_after(router, x).backward()
        optimiser.step()
    assert before > 2.5 and 1.9 < balance_after(router, x) < 2.1


def balance_after(router, x):
    router(x)
    return balance_loss(router)


def test_every_part_of_the_router_gets_a_gradient():
    torch.manual_seed(0)
    layer = MoHAttention(16, 8, 2, 3)
    layer(drawn(2, 9, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


KINDS = ("learned", "query_norm", "output_norm", "random")
OPTIONS = [
    {},
    {"kv_heads": 2, "positions": "rotary"},
    {"head_dim": 6, "causal": False, "bias": True},
    {"preset": "paper"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_leaving_heads_out_changes_nothing(kind, options):
    torch.manual_seed(0)
    layer = MoHAttention(16, 4, 1, 1, kind=kind, **options).double()
    x, valid = drawn(2, 150, 16).double(), torch.ones(2, 150, dtype=torch.bool)
    valid[0, :20] = False
    found = []
    for sparse in (True, False):
        torch.manual_seed(5)
        layer.sparse = sparse
        layer.zero_grad()
        out = layer(x, valid)
        out[valid].sin().sum().backward()
        found.append([out[valid], *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["learned", "query_norm"])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "positions": "rotary"}], ids=str)
def test_steps_are_the_whole_with_padding_and_beams(kind, options):
    torch.manual_seed(0)
    layer = MoHAttention(16, 4, 1, 2, kind=kind, **options).eval()
    x, valid = drawn(2, 12, 16), torch.ones(2, 12, dtype=torch.bool)
    valid[0, :5] = False
    whole, state, parts = layer(x, valid), None, []
    for start in range(0, 12, 3):
        out, state = layer.step(x[:, start : start + 3], state, valid[:, start : start + 3])
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid])
    torch.testing.assert_close(whole[0, 5:], layer(x[:1, 5:])[0], rtol=1e-4, atol=1e-5)
    _, half = layer.step(x[:, :11], None, valid[:, :11])
    swapped, _ = layer.step(x[[1, 1], 11:], half.select(torch.tensor([1, 1])))
    torch.testing.assert_close(swapped[0], whole[1, 11:])


def test_a_long_cache_is_read_for_chosen_heads_alone(monkeypatch):
    told = {**engine.attend_chosen.__kwdefaults__, "least": (128, 512)}
    monkeypatch.setattr(engine.attend_chosen, "__kwdefaults__", told)
    torch.manual_seed(0)
    layer = MoHAttention(16, 4, 1, 1, kind="query_norm").eval()
    x = drawn(1, 700, 16)
    whole = layer(x)
    _, state = layer.step(x[:, :699])
    out, _ = layer.step(x[:, 699:], state)
    torch.testing.assert_close(out, whole[:, 699:])
    off = layer.router(queries=layer.queries(x[:, 699:]).unflatten(-1, (4, 4)).transpose(1, 2))[0, 0] == 0
    keys, values = (t.clone() for t in state.inner)
    keys[:, off], values[:, off] = torch.nan, torch.nan
    poisoned, _ = layer.step(x[:, 699:], state.__class__(state.seen, (keys, values), state.valid))
    assert off.sum() == 2 and torch.equal(poisoned, out)


def test_full_budget_is_the_plain_layer():
    torch.manual_seed(0)
    plain = MultiHeadAttention(18, 9, positions="rotary", kv_heads=3, head_dim=4, bias=True)
    x = drawn(2, 11, 18)
    for kind in ("learned", "query_norm", "output_norm"):
        layer = MoHAttention.of(plain, 4, 5, kind=kind)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-6)
    layer = MoHAttention.of(plain, 4, 3, kind="query_norm")
    assert (layer(x) - plain(x)).abs().max() > 1e-3
    assert layer.queries.weight is not plain.queries.weight
    with pytest.raises(RegardError, match="only a MultiHeadAttention of softmax"):
        MoHAttention.of(MultiHeadAttention(18, 9, mechanism="linear"), 4, 3)
    with pytest.raises(RegardError, match="only a MultiHeadAttention of softmax"):
        MoHAttention.of(MultiHeadAttention(18, 9, gate="silu"), 4, 3)


def test_cross_attention_routes_by_the_queries():
    torch.manual_seed(0)
    layer = MoHAttention(16, 4, 1, 2).eval()
    x, memory, valid = drawn(2, 5, 16), drawn(2, 9, 16, seed=4), torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    out = layer(x, valid, memory=memory)
    q, k, v = (
        f(y).unflatten(-1, (4, 4)).transpose(1, 2)
        for f, y in ((layer.queries, x), (layer.keys, memory), (layer.values, memory))
    )
    heads = (
        scaled_dot_product_attention(q, k, v, valid[:, None, None])
        * layer.router(x).transpose(1, 2)[..., None]
    )
    torch.testing.assert_close(out, layer.output(heads.transpose(1, 2).flatten(2)))


def test_usage_counts_heads_and_leaves_padding_out():
    torch.manual_seed(0)
    layer = MoHAttention(16, 4, 1, 2)
    with torch.no_grad():
        layer.router.route.weight.zero_()
    x, valid = drawn(2, 10, 16), torch.ones(2, 10, dtype=torch.bool)
    valid[0, :5] = False
    with head_usage(layer) as usage:
        layer(x, valid)
        layer(x, valid)
    assert usage.heads["on"].tolist() == [1, 1, 1, 0] and usage.tokens == {"layer.0": 30}
    assert usage.entropy["layer.0"] == pytest.approx(torch.tensor(2.0).log() / torch.tensor(3.0).log())
    assert usage.always_off == pytest.approx(1 / 3) and usage.heads["shared"].tolist() == [1, 0, 0, 0]
    assert not layer.router._forward_hooks
    with head_usage(layer) as idle:
        pass
    with pytest.raises(NothingObserved, match="no router of heads ran"):
        _ = idle.heads
    with pytest.raises(RegardError, match="no router"), head_usage(torch.nn.Linear(2, 2)):
        pass


def test_published_splits():
    kept = {"vit-s-80": 0.8, "vit-s-75": 0.75, "vit-b-75": 0.75, "vit-b-50": 0.5, "dit-xl-90": 0.9,
            "dit-xl-75": 0.75, "dit-l-90": 0.9, "dit-l-75": 0.75, "dit-b-90": 0.9, "dit-b-75": 0.75,
            "dit-s-90": 0.9, "dit-s-75": 0.75}  # fmt: skip
    depths = {"vit-s": (5, 5, 22, 5), "vit-b": (5, 5, 23, 5)}
    for name, share in kept.items():
        specs = MixtureOfHeads.published(name)
        times = depths.get(name[:5], (1,) * len(specs))
        rows = [(n, s.heads, s.shared + s.active) for n, s in zip(times, specs, strict=True)]
        found = sum(n * on / heads for n, heads, on in rows) / sum(times)
        assert found == pytest.approx(share, abs=0.11), name
    specs = MixtureOfHeads.published("dit-xl-90")
    assert len(specs) == 28 and specs[-1].build()(drawn(1, 3, 1152)).shape == (1, 3, 1152)
    assert [s.head_dim * s.heads for s in (specs[0], specs[12], specs[27])] == [576, 1152, 1728]
    with pytest.raises(RegardError, match="no published split 'vit'"):
        MixtureOfHeads.published("vit")


def test_it_can_be_copied_and_pickled_in_training():
    layer = MoHAttention(16, 4, 1, 2)
    layer(drawn(1, 5, 16))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.router.balance is None and layer.router.balance is not None
        torch.testing.assert_close(twin(drawn(1, 5, 16)), layer(drawn(1, 5, 16)))


def test_half_precision_routes_as_float32_does():
    layer = MoHAttention(16, 8, 2, 3).eval()
    x = drawn(2, 30, 16).bfloat16()
    layer.bfloat16()
    gates = layer.router(x)
    assert gates.dtype == torch.float32 and layer(x).dtype == torch.bfloat16
    assert torch.equal(gates != 0, copy.deepcopy(layer.router).double()(x.double()) != 0)


WRONG = [
    (lambda: HeadRouter(16, 8, 6, 3), "6 shared and 3 active routed heads are more than the 8"),
    (lambda: HeadRouter(16, 8, -1, 3), "shared is -1"),
    (lambda: HeadRouter(16, 8, 2, 0), "active is 0, and 6 of 8 heads are routed"),
    (lambda: HeadRouter(16, 8, 2, 1.5), "active is 1.5"),
    (lambda: HeadRouter(16, 0, 0, 0), "heads is 0"),
    (lambda: HeadRouter(0, 8, 2, 3), "dim is 0"),
    (lambda: HeadRouter(16, 8, 2, 3, kind="norm"), "kind is 'norm'; it must be one of learned, query_norm"),
    (lambda: HeadRouter(16, 8, 2, 3, preset="code"), "preset is 'code'"),
    (lambda: HeadRouter(16, 8, 2, 3, preset="paper", fine_tune=True), "do not begin at 1"),
    (lambda: MoHAttention(16, 5, 2, 3), "5 heads do not divide"),
    (lambda: MoHAttention(16, 4, 2, 2, kv_heads=3), "no multiple of the 3 kv_heads"),
    (lambda: MoHAttention(16, 4, 2, 2, head_dim=0), "head_dim is 0"),
    (lambda: MoHAttention(16, 4, 2, 2, positions="alibi"), "positions is 'alibi'"),
    (lambda: MixtureOfHeads(dim=16, heads=4, shared=4, active=1), "more than the 4 heads"),
    (lambda: MixtureOfHeads.stack(dim=16, heads=[4, 4], shared=[1], active=2), "shared has 1 numbers"),
    (lambda: MixtureOfHeads.stack(dim=16, heads=4, shared=1, active=2), "needs a list"),
    (lambda: made(8, 2, 3)(), "reads x, and was not given"),
    (lambda: made(8, 2, 3, kind="query_norm")(drawn(1, 2, 16)), "reads queries"),
    (lambda: MoHAttention(16, 4, 1, 2).weights(drawn(1, 3, 16)), "set layer.sparse = False"),
    (lambda: MoHAttention(16, 4, 1, 2, causal=False).step(drawn(1, 3, 16)), "not causal"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_options_are_refused(wrong, words):
    with pytest.raises(RegardError, match=words):
        wrong()


def test_wrong_shapes_are_refused():
    layer, q = MoHAttention(16, 4, 1, 2), torch.zeros(1, 4, 5, 4)
    with pytest.raises(ShapeMismatch, match=r"x must be \[batch, time, 16\]"):
        layer(drawn(1, 3, 15))
    with pytest.raises(ShapeMismatch, match="mask must be bool"):
        layer(drawn(1, 3, 16), torch.ones(1, 3))
    with pytest.raises(ShapeMismatch, match="memory is of 2"):
        layer(drawn(1, 3, 16), memory=drawn(2, 3, 16))
    with pytest.raises(ShapeMismatch, match=r"queries must be \[batch, 4, time, dim\]"):
        HeadRouter(16, 4, 1, 2, kind="query_norm")(queries=drawn(1, 3, 2, 4))
    with pytest.raises(ShapeMismatch, match=r"gates must be \[batch, time, heads\] \[1, 5, 4\]"):
        moh_attention(q, q, q, torch.ones(1, 4, 5))
    with pytest.raises(RegardError, match="NaN"):
        moh_attention(q * torch.nan, q, q, torch.ones(1, 5, 4))
    weights = MoHAttention(16, 4, 1, 2, sparse=False).weights(drawn(1, 5, 16))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 5))
