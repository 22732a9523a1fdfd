"""Bi-level routing attention: the formula written region by region, routing, padding, layers, refusals."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.attention import BRA, BiLevelRouting, BiLevelRoutingGrid, Context, bi_level_routing_attention
from regard.attention.biformer import LePEAttention, Regions, own_names
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from tests.attention.models import assert_same, differ, outputs
from tests.laws.block_laws import BLOCK_LAWS
from tests.support.families import FAMILIES

MAPS = {
    "line": ((12,), 4, 2),
    "plane": ((6, 8), (3, 4), 3),
    "padded line": ((11,), 4, 3),
    "padded plane": ((7, 10), (3, 4), 4),
    "volume": ((4, 3, 5), (2, 3, 2), 5),
    "one region": ((5, 4), 1, 1),
    "one chosen": ((6, 6), 3, 1),
    "all chosen": ((7, 6), 3, 9),
}


def drawn(grid, heads=2, width=4, values=6, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(math.prod(grid))
    shapes = (width, width, values)
    return [
        torch.randn(batch, *grid, heads, n, generator=generator, dtype=torch.float64).to(dtype)
        for n in shapes
    ]


def tokens_of(grid, counts):
    """Flat positions of each region that are on the map, regions row by row."""
    sizes = [-(-n // s) for n, s in zip(grid, counts, strict=True)]
    found = {region: [] for region in range(math.prod(counts))}
    for flat in range(math.prod(grid)):
        rest, region, scale = flat, 0, 1
        for n, s, a in reversed(list(zip(grid, counts, sizes, strict=True))):
            rest, at = divmod(rest, n)
            region, scale = region + at // a * scale, scale * s
        found[region].append(flat)
    return found


def naive(q, k, v, counts, topk, scale, factor=1.0):
    """Item by item and region by region, and the regions that each has chosen."""
    grid = q.shape[1:-2]
    counts = (counts,) * len(grid) if isinstance(counts, int) else counts
    places = {r: at for r, at in tokens_of(grid, counts).items() if at}
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    out, chosen = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype), {}
    for item in range(len(q)):
        means = {r: [x[item, at].mean(0).flatten().detach() for x in (q, k)] for r, at in places.items()}
        for region, at in places.items():
            score = {other: float(factor * means[region][0] @ means[other][1]) for other in places}
            best = sorted(score, key=score.get, reverse=True)[:topk]
            keys = [p for other in best for p in places[other]]
            weights = torch.einsum("thd,shd->hts", q[item, at], k[item, keys]).mul(scale).softmax(-1)
            out[item, at] = torch.einsum("hts,shd->thd", weights, v[item, keys])
            chosen[item, region] = best
    return out.unflatten(1, grid), chosen


@pytest.mark.parametrize("impl", ["blocks", "dense"])
@pytest.mark.parametrize("name", MAPS)
def test_it_is_the_formula_with_its_gradients(name, impl):
    grid, counts, topk = MAPS[name]
    given = [x.requires_grad_() for x in drawn(grid)]
    expected, chosen = naive(*given, counts, topk, 8**-0.5)
    out, routing = bi_level_routing_attention(*given, counts, topk, impl=impl, return_routing=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(x.sin().sum(), given) for x in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    for (item, region), best in chosen.items():
        listed = routing.index[item, region].tolist()
        assert listed[: len(best)] == best and set(listed[len(best) :]) <= {-1}
        seen = routing.seen(region, item).flatten().nonzero()[:, 0].tolist()
        places = tokens_of(grid, routing.regions.counts)
        assert seen == sorted(p for other in best for p in places[other])


def test_the_scale_is_that_of_the_full_width_and_can_be_another():
    q, k, v = drawn((6, 8))
    for scale, told in ((8**-0.5, {}), (0.5, {"scale": 0.5})):
        expected, _ = naive(q, k, v, (3, 4), 3, scale)
        found = bi_level_routing_attention(q, k, v, (3, 4), 3, **told)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_all_regions_are_full_attention_in_the_order_of_the_map():
    q, k, v = drawn((6, 9), values=4)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*flat, scale=0.3).transpose(1, 2).view(q.shape)
    for regions, topk in ((3, 9), (1, 1), ((2, 3), 6), (4, 16), (5, 25)):
        found = bi_level_routing_attention(q, k, v, regions, topk, 0.3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_positive_factor_on_region_scores_changes_nothing():
    q, k, v = drawn((8, 8))
    expected, _ = naive(q, k, v, 4, 3, 0.3, factor=17.0)
    torch.testing.assert_close(bi_level_routing_attention(q, k, v, 4, 3, 0.3), expected, rtol=0, atol=1e-12)


def test_no_gradient_passes_through_the_routing():
    q, k, v = (x.requires_grad_() for x in drawn((8, 8)))
    out, routing = bi_level_routing_attention(q, k, v, 4, 3, return_routing=True)
    assert out.requires_grad and not routing.scores.requires_grad
    given = drawn((6, 6), heads=1, width=2, values=2, batch=1)
    for x in given:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: bi_level_routing_attention(*x, 3, 2), given)


@pytest.mark.parametrize("impl", ["blocks", "dense"])
def test_attended_padding_is_zeros_after_the_projection(impl):
    q, k, v = drawn((7, 10))
    whole = [Regions((7, 10), (3, 5)).padded(x) for x in (q, k, v)]
    found, routing = bi_level_routing_attention(
        q, k, v, (3, 5), 4, mask_padding=False, return_routing=True, impl=impl
    )
    plan = Regions((9, 10), (3, 5))
    parts = [plan.split(x).flatten(3) if x is not whole[2] else plan.split(x) for x in whole]
    for item in range(2):
        for region in range(15):
            best = routing.index[item, region]
            keys, values = parts[1][item, best].flatten(0, 1), parts[2][item, best].flatten(0, 1)
            queries = parts[0][item, region]
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                weights = (queries[:, part] @ keys[:, part].T * 8**-0.5).softmax(-1)
                expected = torch.zeros(1, 15, 6, 6, dtype=torch.float64)
                expected[0, region] = weights @ values[:, head]
                place = torch.zeros(1, 15, 6, dtype=torch.bool)
                place[0, region] = True
                there = plan.joined(place)[0, :7]
                torch.testing.assert_close(
                    found[item, ..., head, :][there], plan.joined(expected)[0, :7][there], rtol=0, atol=1e-12
                )
    hidden = bi_level_routing_attention(q, k, v, (3, 5), 4, impl=impl)
    assert (hidden - found).abs().max() > 1e-3


def test_hidden_padding_changes_nothing_inside_when_all_regions_are_chosen():
    q, k, v = drawn((8, 8))
    whole = bi_level_routing_attention(q, k, v, 4, 16)
    torch.testing.assert_close(bi_level_routing_attention(q, k, v, 5, 25), whole, rtol=0, atol=1e-12)
    seen = bi_level_routing_attention(q, k, v, 5, 25, mask_padding=False)
    assert (seen - whole).abs().max() > 1e-2


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("topk", [2, 3, 6])
def test_a_padding_mask_is_as_if_the_tokens_were_not_there(topk, mask_padding):
    q, k, v = drawn((12,))
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 5:] = False
    junk = [torch.where(valid[..., None, None], x, 1e4) for x in (q, k, v)]
    out, routing = bi_level_routing_attention(
        *junk, 6, topk, valid=valid, mask_padding=mask_padding, return_routing=True
    )
    assert set(routing.index[0].unique().tolist()) <= {-1, 0, 1, 2}, "an empty region was chosen"
    short, _ = naive(*(x[:1, :5] for x in (q, k, v)), 3, topk, 8**-0.5)
    torch.testing.assert_close(out[:1, :5], short, rtol=0, atol=1e-12)
    assert not out[0, 5:].any()
    whole = bi_level_routing_attention(q[1:], k[1:], v[1:], 6, topk)
    torch.testing.assert_close(out[1:], whole, rtol=0, atol=1e-12)
    dense = bi_level_routing_attention(*junk, 6, topk, valid=valid, mask_padding=mask_padding, impl="dense")
    torch.testing.assert_close(dense, out, rtol=0, atol=1e-12)


def test_an_item_of_nothing_but_padding_is_zero_with_finite_gradients():
    valid = torch.tensor([[True] * 8, [False] * 8])
    for topk in (2, 4):
        given = [x.requires_grad_() for x in drawn((8,))]
        out = bi_level_routing_attention(*given, 4, topk, valid=valid)
        assert not out[1].any()
        for grad in torch.autograd.grad(out.sum(), given):
            assert grad.isfinite().all() and not grad[1].any()


def test_half_precision_comes_out_as_it_went_in():
    given = drawn((8, 8))
    exact = bi_level_routing_attention(*given, 4, 3)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2)):
        low = [x.to(dtype) for x in given]
        found = bi_level_routing_attention(*low, 4, 3)
        assert found.dtype == dtype
        exact = bi_level_routing_attention(*(x.double() for x in low), 4, 3)
        assert (found.double() - exact).abs().max() < bound


@pytest.mark.parametrize("size", [(14, 21), (15, 20)])
def test_rows_are_the_weights_that_the_layer_uses(size):
    torch.manual_seed(0)
    for options in ({}, {"pad_input": True}, {"mask_padding": False}):
        layer = BRA(8, 2, regions=7, topk=5, **options).double()
        x = torch.randn(2, *size, 8, dtype=torch.float64)
        count = math.prod(size)
        rows = layer.rows(x, range(count))
        assert layer.grids(x) == (size, size) and rows.shape == (2, 2, count, count)
        torch.testing.assert_close(layer.rows(x, [3, 200]), rows[:, :, [3, 200]], rtol=0, atol=1e-12)
        exact = size == (14, 21) or not options
        assert bool((rows.sum(-1) > 1 - 1e-9).all()) == exact, "padding that is attended has weight too"
        seen = layer.routing(x).seen(0)
        assert torch.equal(rows[0, 0, 0].view(size) > 0, seen)
        if exact:
            values = layer.qkv(x)[..., 16:]
            mixed = (rows @ values.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2)
            beside = layer.lepe(values.movedim(-1, 1)).movedim(1, -1)
            expected = layer.proj(mixed.flatten(2).view(x.shape) + beside)
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def legacy(layer, x, regions, topk):
    """The older official module, token layout and all, written with loops over regions; it pads x."""
    high, wide = (-(-n // regions) for n in x.shape[1:3])
    x = F.pad(x, (0, 0, 0, wide * regions - x.shape[2], 0, high * regions - x.shape[1]))
    q, k, v = layer.qkv(x).chunk(3, -1)
    cells = [(slice(i * high, i * high + high), slice(j * wide, j * wide + wide))
             for i in range(regions) for j in range(regions)]  # fmt: skip
    out = torch.empty_like(v)
    for item in range(len(x)):
        parts = [
            [y[item, rows, columns].reshape(-1, y.shape[-1]) for rows, columns in cells] for y in (q, k, v)
        ]
        scores = torch.stack([y.mean(0) for y in parts[0]]) @ torch.stack([y.mean(0) for y in parts[1]]).T
        for region, best in enumerate(scores.topk(topk).indices.tolist()):
            for part in torch.arange(x.shape[-1]).split(x.shape[-1] // layer.heads):
                keys, values = (torch.cat([parts[n][other] for other in best])[:, part] for n in (1, 2))
                weights = (parts[0][region][:, part] @ keys.T * x.shape[-1] ** -0.5).softmax(-1)
                rows, columns = cells[region]
                out[item, rows, columns, part[0] : part[-1] + 1] = (weights @ values).view(high, wide, -1)
    return layer.proj(out + layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(6, 9), (7, 10)])
def test_the_layer_is_the_older_official_one(size):
    torch.manual_seed(0)
    layer = BRA(12, 3, regions=3, topk=4, pad_input=True).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    expected = legacy(layer, x, 3, 4)[:, : size[0], : size[1]]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.reference(x), expected, rtol=0, atol=1e-12)


def test_both_official_names_load():
    torch.manual_seed(0)
    ours, x = BRA(8, 2, 3, 2), torch.randn(1, 6, 6, 8)
    state = ours.state_dict()
    old = {name.replace("qkv.", "qkv.qkv.").replace("proj.", "wo."): y for name, y in state.items()}
    new = {
        name.replace("qkv.", "qkv_linear.").replace("proj.", "output_linear."): y for name, y in state.items()
    }
    new |= {name: y[..., None, None] for name, y in new.items() if name.endswith("linear.weight")}
    for names in (state, old, new):
        again = torch.nn.Sequential(BRA(8, 2, 3, 2))
        again.load_state_dict({f"0.{name}": y for name, y in names.items()})
        assert torch.equal(again(x), ours(x))
    assert set(old) == {"qkv.qkv.weight", "qkv.qkv.bias", "lepe.weight", "lepe.bias", "wo.weight", "wo.bias"}
    assert own_names(new).keys() == state.keys()
    with pytest.raises(RuntimeError, match="qkv.weight"):
        BRA(8, 2, 3, 2).load_state_dict({"wo.bias": torch.zeros(8)})


def test_the_layer_takes_a_padding_mask():
    torch.manual_seed(0)
    layer = BRA(8, 2, regions=3, topk=2, axes=1).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    valid = torch.arange(12)[None] < 9
    found = layer(torch.where(valid[..., None], x, 1e4), valid)[:, :8]
    dirty = layer(torch.where(valid[..., None], x, -3.0), valid)[:, :8]
    torch.testing.assert_close(found, dirty, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.reference(x, valid)[:, :8], found, rtol=0, atol=1e-12)
    padded = BRA(8, 2, regions=5, topk=2, axes=1, pad_input=True).double()
    assert padded(x, valid).shape == x.shape


def test_attention_to_all_with_lepe_is_a_block():
    def build():
        return LePEAttention(8, 2, lepe=3)

    for law, hold in BLOCK_LAWS.items():
        if law != "causal":
            torch.manual_seed(0)
            hold(SimpleNamespace(build=build, module=LePEAttention))
    with pytest.raises(ShapeMismatch, match=r"x is \[2, 5, 8\]; it must be"):
        build()(torch.zeros(2, 5, 8))


def test_operations_are_counted():
    layer, x = BRA(64, 2, regions=7, topk=1), torch.zeros(2, 56, 56, 64)
    tokens = 56 * 56
    projections, filters, routing, attention = (
        4 * 64 * 64 * tokens,
        25 * 64 * tokens,
        49**2 * 64,
        2 * tokens * 64 * 64,
    )
    assert layer.multiply_adds(x) == 2 * (projections + filters + routing + attention)
    padded = BRA(64, 2, regions=7, topk=2, lepe=0).multiply_adds(torch.zeros(1, 13, 14, 64))
    assert padded == 4 * 64 * 64 * 196 + 49**2 * 64 + 2 * 196 * 2 * 4 * 64


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_swapped_into_an_encoder(name):
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "none")
    plain = outputs(model, inputs)
    with regard.swap(model, BiLevelRouting(4, topk=1)):
        assert differ(outputs(model, inputs), plain)
    with regard.swap(model, BiLevelRouting(4, topk=4)):
        assert_same(outputs(model, inputs), plain, inputs)
    llama = FAMILIES["llama"].build()
    with pytest.raises(UnsupportedModel, match="causal order"), regard.swap(llama, BiLevelRouting()):
        outputs(llama, FAMILIES["llama"].inputs(llama, "none"))


def test_segments_of_a_sequence_are_the_regions_of_a_line():
    q, k, v = drawn((14,), values=4)
    expected = bi_level_routing_attention(q, k, v, 5, 2, 0.5)
    mine = [x.transpose(1, 2) for x in (q, k, v)]
    found = BiLevelRouting(5, 2).build()(*mine, Context.of(*mine[:2], causal=False))
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=0, atol=1e-12)


Q, K, V = drawn((9, 8))


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: bi_level_routing_attention(Q, K, V, 3, 0), RegardError, "topk is 0; .* from 1 to 9"),
        (lambda: bi_level_routing_attention(Q, K, V, 3, 10), RegardError, "topk is 10; .* from 1 to 9"),
        (lambda: bi_level_routing_attention(Q, K, V, 3, True), RegardError, "topk is True"),
        (lambda: bi_level_routing_attention(Q, K, V, 10, 2), RegardError, "10 along axis 0, which has 9"),
        (lambda: bi_level_routing_attention(Q, K, V, (3, 9), 2), RegardError, "9 along axis 1, which has 8"),
        (lambda: bi_level_routing_attention(Q, K, V, 3, 2, auto_pad=False), RegardError, "8 positions"),
        (lambda: bi_level_routing_attention(Q, K, V, (3,), 2), RegardError, "one number or 2"),
        (lambda: bi_level_routing_attention(Q, K, V, 0, 2), RegardError, "regions is 0; .* from 1"),
        (lambda: bi_level_routing_attention(Q, K, V, 3, 2, impl="cuda"), RegardError, "impl is 'cuda'"),
        (lambda: bi_level_routing_attention(Q, K[:, :8], V, 3, 2), ShapeMismatch, "of one map"),
        (lambda: bi_level_routing_attention(Q, K.float(), V, 3, 2), ShapeMismatch, "of one map"),
        (lambda: bi_level_routing_attention(Q[0, 0], K, V, 3, 2), ShapeMismatch, "1 to 3 axes, heads, dim"),
        (lambda: bi_level_routing_attention(Q.int(), K, V, 3, 2), ShapeMismatch, "must be floating-point"),
        (lambda: bi_level_routing_attention(Q[:, :0], K[:, :0], V[:, :0], 3, 2), ShapeMismatch, "tokens"),
        (
            lambda: bi_level_routing_attention(Q, K, V, 3, 2, valid=torch.ones(2, 9)),
            ShapeMismatch,
            r"valid is float32 \[2, 9\]; it must be bool \[2, 9, 8\]",
        ),
        (lambda: BRA(8, 3), RegardError, "dim is 8, which 3 heads do not divide"),
        (lambda: BRA(8, 2, 2, 5), RegardError, "topk is 5; .* 1 to 4"),
        (lambda: BRA(8, 2, lepe=4), RegardError, "lepe is 4; it must be an odd number, or 0"),
        (lambda: BRA(8, 2, axes=4), RegardError, "axes is 4"),
        (lambda: BRA(8, 2)(torch.zeros(1, 14, 8)), ShapeMismatch, r"x is \[1, 14, 8\]; .* 2 axes, 8"),
        (lambda: BRA(8, 2)(torch.zeros(1, 14, 6, 8)), RegardError, "7 along axis 1, which has 6"),
        (lambda: BRA(8, 2, auto_pad=False)(torch.zeros(1, 14, 9, 8)), RegardError, "9 positions, which 7"),
        (lambda: BRA(8, 2)(torch.zeros(1, 7, 7, 8), torch.ones(1, 7)), ShapeMismatch, "valid is float32"),
        (lambda: BRA(8, 2, axes=1).rows(torch.zeros(1, 9, 8), [0]), RegardError, "no queries and keys on a"),
        (lambda: BRA(8, 2).rows(torch.zeros(1, 7, 7, 8), [49]), RegardError, "from 0 to 48"),
        (lambda: LePEAttention(8, 3), RegardError, "dim is 8, which 3 heads"),
        (lambda: LePEAttention(8, 2, lepe=2), RegardError, "lepe is 2"),
        (lambda: BiLevelRoutingGrid(dim=8, heads=2, regions=2, topk=9), RegardError, "topk is 9"),
        (lambda: BiLevelRouting(4, 5), RegardError, "topk is 5"),
        (lambda: BiLevelRouting().build()(*(x.flatten(1, 2).transpose(1, 2) for x in (Q, K, V)), causal()),
         RegardError, "causal order"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def causal():
    return Context.of(*(x.flatten(1, 2).transpose(1, 2) for x in (Q, K)))
