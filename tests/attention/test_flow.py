"""Flow-Attention: its formula in loops, flow that is conserved, masks, decoding, and what is refused."""

import pytest
import torch

import regard
from regard.attention import Context, FlowAttention, LinearAttention, get
from regard.attention.dsf.formulas import causal_flow
from regard.attention.flow import PRESETS, flow_attention, heads
from regard.engines.flows import causal_flows
from regard.errors import RegardError, ShapeMismatch
from tests.attention.models import differ, generated, prompt
from tests.support.families import FAMILIES

EPS = 1e-6


def drawn(length, keys=None, *, batch=1, heads=1, dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + length)
    shapes = [(batch, heads, n, d) for n, d in ((length, dim), (keys or length, dim), (keys or length, 3))]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def flow(a, b):
    return float(((a + EPS) * (b + EPS)).sum())


def in_loops(q, k, v, clamp=None):
    """The formula for one head, sum by sum; also what leaves the sources and arrives at the targets."""
    q, k = q.sigmoid(), k.sigmoid()
    incoming = [flow(a, k.sum(0)) for a in q]
    outgoing = [flow(b, q.sum(0)) for b in k]
    arriving = torch.tensor([flow(a, sum(b / o for b, o in zip(k, outgoing, strict=True))) for a in q])
    leaving = torch.tensor([flow(b, sum(a / i for a, i in zip(q, incoming, strict=True))) for b in k])
    bounded = leaving if clamp is None else leaving.clamp(-clamp, clamp)
    write = bounded.double().softmax(0) * len(k)
    gates = torch.sigmoid(arriving.double() * len(q) / len(k))
    rows = [g * sum(w * (a @ b) * x for w, b, x in zip(write, k, v, strict=True)) / i
            for g, a, i in zip(gates, q, incoming, strict=True)]  # fmt: skip
    return torch.stack(rows), leaving, arriving


@pytest.mark.parametrize(("targets", "sources"), [(9, 9), (5, 14), (14, 5), (1, 1)])
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_it_is_the_formula_and_flow_is_conserved(targets, sources, clamp):
    q, k, v = drawn(targets, sources)
    expected, leaving, arriving = in_loops(q[0, 0], k[0, 0], v[0, 0], clamp)
    for method in ("chunk", "naive"):
        found = flow_attention(q, k, v, clamp=clamp, method=method)[0, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert abs(float(leaving.sum()) - targets) < 1e-4 and abs(float(arriving.sum()) - sources) < 1e-4


@pytest.mark.parametrize("length", [1, 2, 64, 65, 200])
def test_causally_it_is_the_formula_in_chunks_and_position_by_position(length, monkeypatch):
    q, k, v = drawn(length, heads=2)
    expected = torch.stack(
        [causal_flow(*(x[0, h] for x in (q.sigmoid(), k.sigmoid(), v)))[2] for h in (0, 1)]
    )
    for pieces in (2**17, 2**9):
        monkeypatch.setattr(heads, "NUMBERS", {"cpu": pieces, "cuda": pieces})
        for method in ("chunk", "naive", "recurrent"):
            found = flow_attention(q, k, v, causal=True, clamp=None, method=method)
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


def test_flows_go_on_from_their_sums():
    q, k, _ = (x.sigmoid() for x in drawn(150, heads=2))
    n = torch.arange(1.0, 151.0, dtype=torch.float64)[None]
    whole = causal_flows(q, k, n, eps=EPS)
    torch.testing.assert_close(whole.incoming, ((q + EPS) * (k.cumsum(2) + EPS)).sum(-1), rtol=1e-12, atol=0)
    first = causal_flows(q[:, :, :70], k[:, :, :70], n[:, :70], eps=EPS)
    second = causal_flows(q[:, :, 70:], k[:, :, 70:], n[:, 70:], first.sums, eps=EPS)
    for name in ("incoming", "arriving", "leaving"):
        both = torch.cat([getattr(first, name), getattr(second, name)], 2)
        torch.testing.assert_close(both, getattr(whole, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(second.sums, whole.sums, rtol=1e-12, atol=0)


def test_a_clamp_at_one_levels_half_of_the_sources():
    """What leaves has a mean of 1, so that the core file's clamp hits about every second source."""
    q, k, v = drawn(256, dim=16)
    leaving = in_loops(q[0, 0], k[0, 0], v[0, 0])[1]
    assert 0.4 < float((leaving > 1).double().mean()) < 0.6
    k.requires_grad_()
    plain = flow_attention(q, k, v)
    assert (plain - flow_attention(q, k, v, clamp=1.0)).abs().max() > 1e-4
    without = FlowAttention(competition=False).build()(q, k, v, Context.of(q, k, causal=False))
    assert (plain - without).abs().max() > 1e-4


def test_padding_is_as_if_it_were_not_there():
    q, k, v = drawn(7, 11, batch=2)
    keys, queries = torch.ones(2, 11).bool(), torch.ones(2, 7).bool()
    keys[0, 2:6], queries[0, 4:] = False, False
    found = flow_attention(q, k, v, key_mask=keys, query_mask=queries)
    alone = flow_attention(q[:1, :, :4], k[:1, :, keys[0]], v[:1, :, keys[0]])
    torch.testing.assert_close(found[:1, :, :4], alone)
    torch.testing.assert_close(found[1:], flow_attention(q[1:], k[1:], v[1:]))
    assert (flow_attention(q, k, v, key_mask=keys) - found)[0].abs().max() > 1e-6, "masked queries count"


both = pytest.mark.parametrize("causal", [False, True])


@both
@pytest.mark.parametrize("kernel", ["sigmoid", "relu"])
def test_no_valid_key_gives_zeros(causal, kernel):
    given = [x.requires_grad_() for x in drawn(70, batch=2)]
    mask = torch.ones(2, 70).bool()
    mask[0] = False
    out = flow_attention(*given, causal=causal, kernel=kernel, key_mask=mask)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().min() > 0
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad[1].abs().sum() > 0 for x in given)


@both
@pytest.mark.parametrize("kernel", ["sigmoid", "relu"])
@pytest.mark.parametrize("signs", ["random", "alternating", "keys below"])
def test_gradients_are_finite_at_extreme_inputs(causal, kernel, signs):
    q, k, v = (50 * x.sign() for x in drawn(70, batch=2, dtype=torch.float32))
    if signs == "alternating":
        q[:, :, ::2], k[:, :, 1::2] = -50, -50
    elif signs == "keys below":
        k[:, :, :-1] = -50
    given = [x.requires_grad_() for x in (q, k, v)]
    for clamp in ("auto", None):
        out = flow_attention(*given, causal=causal, kernel=kernel, clamp=clamp)
        grads = torch.autograd.grad(out.sin().sum(), given)
        assert torch.isfinite(out).all() and all(torch.isfinite(x).all() for x in grads)
        assert grads[2].abs().sum() > 0


def test_the_state_has_the_same_size_however_long_the_past():
    attention = FlowAttention().build()
    sizes = set()
    for length in (1, 7, 300):
        _, state = attention.step(*drawn(length, heads=2), None)
        sizes.add(tuple(x.numel() for x in state))
    assert len(sizes) == 1


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=repr)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_swapped_in_it_decodes_as_it_computes(name, way):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    plain = generated(model, inputs)[1]
    with regard.swap(model, FlowAttention()):
        options = {n: v for n, v in way.items() if n != "prefill_chunk_size"}
        expected, scores = generated(model, inputs, use_cache=False, **options)
        found, others = generated(model, inputs, **way)
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)
    assert differ(scores[0, -1], plain[0, -1])


def test_a_cache_of_keys_is_not_taken_over():
    model = FAMILIES["llama"].build()
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6]).past_key_values
        with (
            pytest.raises(RegardError, match="start with an empty cache"),
            regard.swap(model, FlowAttention()),
        ):
            model(input_ids=ids[:, 6:], past_key_values=cache)


def test_presets_are_those_of_the_folders():
    assert {name: FlowAttention.preset(name).clamp for name in PRESETS} == {
        "core": 1.0, "vision": 1.0, "language": 5.0, "reinforcement-learning": 10.0, "time-series": None,
        "long-range-arena": None,
    }  # fmt: skip
    assert FlowAttention.preset("long-range-arena").kernel == "relu"
    assert get("flowformer", clamp=5.0) == FlowAttention.preset("language")


def test_auto_clamps_at_ten_in_causal_order_alone():
    q, k, v = drawn(30)
    q[:, :, 2:] = -12
    k[:, :, 3:-1] = -12
    k[:, :, -1] = 12
    for causal, same in ((True, 10.0), (False, None)):
        auto = flow_attention(q, k, v, causal=causal)
        assert torch.equal(auto, flow_attention(q, k, v, causal=causal, clamp=same))
        other = flow_attention(q, k, v, causal=causal, clamp=None if causal else 10.0)
        assert (auto - other).abs().max() > 1e-9


Q, K, V = drawn(6, batch=2, heads=2)
BOOL = torch.ones(2, 6).bool()
STATE = FlowAttention().build().step(Q, K, V, None)[1]


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: flow_attention(Q, K[:, :, :5], V[:, :, :5], causal=True), ShapeMismatch, "L is 6 and S 5"),
        (lambda: flow_attention(Q, K, V[:, :, :5]), ShapeMismatch, "v .B, Hkv, S, Dv"),
        (lambda: flow_attention(Q, K, V[0]), ShapeMismatch, "v must be floating-point"),
        (lambda: flow_attention(Q.masked_fill(Q > 1, torch.inf), K, V), RegardError, "q holds .* numbers"),
        (lambda: flow_attention(Q, K, V, kernel="elu"), RegardError, "kernel is 'elu'; .* sigmoid, relu"),
        (lambda: flow_attention(Q, K, V, method="fast"), RegardError, "method is 'fast'"),
        (lambda: flow_attention(Q, K, V, method="recurrent"), RegardError, "needs causal=True"),
        (lambda: flow_attention(Q, K, V, key_mask=torch.ones(6, 6).bool()), ShapeMismatch, "no score matrix"),
        (lambda: flow_attention(Q, K, V, query_mask=torch.zeros(2, 6)), ShapeMismatch, "float32"),
        (lambda: flow_attention(Q, K, V, causal=True, query_mask=BOOL), RegardError, "no query_mask"),
        (lambda: FlowAttention(clamp=0), RegardError, "clamp is 0"),
        (lambda: FlowAttention(clamp="none"), RegardError, "clamp is 'none'"),
        (lambda: FlowAttention(eps=-1.0), RegardError, "eps is -1.0"),
        (lambda: FlowAttention.preset("nlp"), RegardError, "no preset 'nlp'; they are core"),
        (lambda: FlowAttention().build()(Q[:, :, 3:], K, V), ShapeMismatch, "3 for 6 keys; use `step`"),
        (lambda: FlowAttention().build().step(Q[:1], K[:1], V[:1], STATE), ShapeMismatch, "state has shapes"),
        (lambda: FlowAttention().build().step(Q.float(), K, V, STATE), ShapeMismatch, "is torch.float64"),
        (lambda: FlowAttention().build().step(Q, K, V, LinearAttention().build().step(Q, K, V, None)[1]),
         ShapeMismatch, "the state has shapes"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def test_a_bias_or_a_window_is_refused():
    mask = torch.ones(6, 6).tril().bool() & ~torch.ones(6, 6).tril(-3).bool()
    from regard.engines.masks import TensorMask

    for ctx, told in (
        (Context(mask=TensorMask(mask[None, None], 6, 6), plain=False), "a mask besides causal order"),
        (Context(mask=Context.of(Q, K).mask, bias=torch.zeros(1, 1, 6, 6)), "a position bias"),
    ):
        with pytest.raises(RegardError, match=told):
            FlowAttention().build()(Q, K, V, ctx)
