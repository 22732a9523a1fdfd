"""Neighbourhood attention: ways that must agree, borders, decoding, natten's old functions, and refusals."""

import math

import pytest
import torch

import regard
from regard.attention import Context, MultiHeadAttention, Neighborhood, NeighborhoodGrid, get
from regard.attention.neighborhood import (
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na1d,
    na2d,
    na3d,
    natten2dav,
    natten2dqkrpb,
    neighborhood_index,
    neighborhood_mask,
)
from regard.errors import RegardError, ShapeMismatch
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES

CASES = {
    "1-D": (na1d, (23,), {"kernel_size": 6, "stride": 2, "dilation": 3}),
    "1-D causal": (na1d, (23,), {"kernel_size": 5, "is_causal": True}),
    "2-D": (na2d, (12, 10), {"kernel_size": (5, 3), "dilation": (2, 1)}),
    "2-D causal": (na2d, (12, 10), {"kernel_size": 4, "stride": (1, 3), "is_causal": (True, False)}),
    "3-D": (na3d, (6, 5, 7), {"kernel_size": (3, 2, 5), "stride": (2, 1, 1)}),
}


def drawn(grid, heads=4, kv_heads=2, width=8, values=6, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(len(grid))
    shapes = ((heads, width), (kv_heads, width), (kv_heads, values))
    return [torch.randn(batch, *grid, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", CASES)
def test_tiles_lists_and_the_definition_agree(name, extra):
    attend, grid, options = CASES[name]
    given = [x.requires_grad_() for x in drawn(grid)]
    more = {}
    if extra:
        keys, values = (torch.randn(2, extra, 2, d, dtype=torch.float64, requires_grad=True) for d in (8, 6))
        more = {"additional_keys": keys, "additional_values": values}
    found = {}
    for impl in ("dense", "tiles", "index"):
        out, lse = attend(*given, **options, **more, scale=0.4, return_lse=True, impl=impl)
        wanted = [*given, *more.values()]
        found[impl] = [out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), wanted)]
    for impl in ("tiles", "index"):
        for one, other in zip(found[impl], found["dense"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    mask = neighborhood_mask(grid, **options)
    assert neighborhood_index(grid, **options).ge(0).sum() == mask.sum() < mask.numel()


def test_additional_keys_share_one_softmax():
    q, k, v = drawn((9,), values=8)
    keys, values = torch.randn(2, 2, 3, 2, 8, dtype=torch.float64)
    found = na1d(q, k, v, 3, additional_keys=keys, additional_values=values)
    all_k, all_v = (torch.cat([x, y], 1).repeat_interleave(2, 2) for x, y in ((k, keys), (v, values)))
    seen = torch.cat([neighborhood_mask(9, 3), torch.ones(9, 3, dtype=torch.bool)], 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, all_k, all_v)), attn_mask=seen
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-12)
    assert (found - na1d(q, k, v, 3)).abs().max() > 0.05


def test_masks_by_hand():
    picture = ["1111....", "1111....", "1111....", ".1111...", "..1111..", "...1111.", "....1111", "....1111"]
    by_hand = torch.tensor([[c == "1" for c in row] for row in picture])
    assert torch.equal(neighborhood_mask(8, 4), by_hand)
    dilated = ["1.1.1..", ".1.1.1.", "1.1.1..", ".1.1.1.", "..1.1.1", ".1.1.1.", "..1.1.1"]
    by_hand = torch.tensor([[c == "1" for c in row] for row in dilated])
    assert torch.equal(neighborhood_mask(7, 3, dilation=2), by_hand)
    blocked = neighborhood_mask(9, 4, stride=4)
    assert blocked[:4, :4].all() and blocked[8].nonzero()[:, 0].tolist() == [5, 6, 7, 8], (
        "pulled back at the end"
    )
    assert neighborhood_mask(6, 4, stride=2, is_causal=True).sum(1).tolist() == [1, 2, 3, 4, 3, 4]


@pytest.mark.parametrize(("grid", "k", "d"), [((9, 8), (3, 4), 1), ((12, 9), 3, (2, 3)), ((5, 6, 7), 3, 1)])
def test_border_rows_see_as_many_keys_as_others(grid, k, d):
    count = math.prod([k] * len(grid) if isinstance(k, int) else k)
    assert neighborhood_mask(grid, k, dilation=d).sum(1).unique().tolist() == [count]


def test_whole_axes_are_self_attention():
    q, k, v = drawn((5, 4), kv_heads=4, values=8)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).view(q.shape)
    torch.testing.assert_close(na2d(q, k, v, (5, 4)), expected, rtol=0, atol=1e-12)
    flat = torch.nn.functional.scaled_dot_product_attention(*flat, is_causal=True).transpose(1, 2)
    line = [x.flatten(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(na1d(*line, 20, is_causal=True), flat, rtol=0, atol=1e-12)


def test_a_shift_of_the_plane_shifts_the_interior_and_not_with_blocks():
    q, k, v = drawn((20, 20), dtype=torch.float32)
    moved = [x.roll((1, 1), (1, 2)) for x in (q, k, v)]
    inside = (slice(None), slice(5, 15), slice(5, 15))
    off = {
        stride: (na2d(*moved, 4, stride).roll((-1, -1), (1, 2)) - na2d(q, k, v, 4, stride))[inside]
        .abs()
        .max()
        for stride in (1, 4)
    }
    assert off[1] < 1e-6 and off[4] > 0.1


def test_a_causal_axis_shows_nothing_later():
    q, k, v = drawn((8, 7))
    before = na2d(q, k, v, 3, is_causal=(True, False))
    for x in (q, k, v):
        x[:, 5:] += 1
    after = na2d(q, k, v, 3, is_causal=(True, False))
    assert torch.equal(after[:, :5], before[:, :5]) and not torch.equal(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_two_functions_of_old_natten(dilation):
    q, k, v = drawn((11, 13), kv_heads=4)
    rpb = torch.randn(4, 9, 9, dtype=torch.float64)
    heads_first = [x.permute(0, 3, 1, 2, 4) for x in (q, k, v)]
    scores = natten2dqkrpb(heads_first[0] * 8**-0.5, heads_first[1], rpb, 5, dilation)
    out = natten2dav(scores.softmax(-1), heads_first[2], 5, dilation)
    expected = na2d(q, k, v, 5, dilation=dilation, rpb=rpb)
    torch.testing.assert_close(out.permute(0, 2, 3, 1, 4), expected, rtol=0, atol=1e-12)
    assert (na2d(q, k, v, 5, dilation=dilation) - expected).abs().max() > 0.1
    near = natten2dqkrpb(*(torch.ones_like(x) for x in heads_first[:2]), rpb, 5, dilation) - 8
    middle = near[0, :, 5, 6].view(4, 5, 5)
    torch.testing.assert_close(middle, rpb[:, 2:7, 2:7], msg="in the middle the window is that of the table")
    corner = near[0, :, 0, 0].view(4, 5, 5)
    torch.testing.assert_close(corner, rpb[:, 4:, 4:], msg="in a corner all keys are after the query")


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_layer_decodes_from_what_its_window_holds(dilation):
    layer = NeighborhoodAttention1D(16, 4, 4, dilation=dilation, is_causal=True).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    whole, state, parts = layer(x), None, []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 15), (15, 16), (16, 21)):
        out, state = layer.step(x[:, start:stop], state)
        parts.append(out)
        assert state[0].shape[2] <= 3 * dilation
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_layers_have_the_parameters_of_natten():
    layer = NeighborhoodAttention2D(12, 3, kernel_size=5, rel_pos_bias=True)
    shapes = {name: tuple(x.shape) for name, x in layer.named_parameters()}
    assert shapes == {
        "rpb": (3, 9, 9),
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    assert NeighborhoodAttention3D(8, 2, 2)(torch.randn(1, 3, 4, 5, 8)).shape == (1, 3, 4, 5, 8)
    assert "kernel_size=5" in repr(layer)


@pytest.mark.parametrize("spec", [Neighborhood(4), Neighborhood(3, dilation=2)], ids=repr)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_swapped_in_it_generates_as_it_computes(name, spec):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    with regard.swap(model, spec):
        for way in ({}, {"num_beams": 2}):
            expected, scores = generated(model, inputs, use_cache=False, **way)
            found, others = generated(model, inputs, **way)
            assert torch.equal(found, expected)
            torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)
        near = outputs(model, inputs)
    plain, keep = outputs(model, inputs), inputs["attention_mask"].bool()
    assert differ(near[keep], plain[keep])
    with regard.swap(model, Neighborhood(512)):
        assert_same(outputs(model, inputs), plain, inputs)


def test_a_swap_counts_neighbours_behind_left_padding():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model, "left")
    valid = inputs["attention_mask"]
    inputs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
    with regard.swap(model, Neighborhood(3)):
        whole = outputs(model, inputs)
        for item in range(2):
            mask = valid[item].bool()
            alone = outputs(model, {"input_ids": inputs["input_ids"][item : item + 1, mask]})
            torch.testing.assert_close(whole[item][mask], alone[0], rtol=1e-4, atol=1e-4)


def test_it_is_the_causal_window_and_at_the_start_it_shrinks():
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    expected = get("sliding-window", window=5).build()(q, k, v)
    torch.testing.assert_close(Neighborhood(5).build()(q, k, v), expected, rtol=0, atol=1e-12)


def test_a_layer_trains_with_it():
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 4, mechanism=Neighborhood(4), positions="rotary")
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


Q, K, V = drawn((9, 8))
LINE = drawn((9,))
TABLE = torch.zeros(4, 5, 5, dtype=torch.float64)
MORE = torch.zeros(2, 3, 2, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: na2d(Q, K, V, 1), RegardError, "kernel_size is 1; it must be whole numbers from 2"),
        (lambda: na2d(Q, K, V, 3, 4), RegardError, "stride is 4 and kernel_size 3"),
        (lambda: na2d(Q, K, V, 3, 0), RegardError, "stride is 0"),
        (lambda: na2d(Q, K, V, 3, dilation=3), RegardError, "3 x 3 on axis 1, which has 8 positions"),
        (lambda: na2d(Q, K, V, 10), RegardError, "10 x 1 on axis 0, which has 9"),
        (lambda: na2d(Q, K, V, (3, 3, 3)), RegardError, "one number or 2"),
        (lambda: na2d(Q, K, V, 3.0), RegardError, "kernel_size is 3.0"),
        (lambda: na2d(Q, K, V, 3, is_causal=1), RegardError, "is_causal is 1; it must be True or False"),
        (lambda: na2d(Q, K, V, 3, is_causal=(True,)), RegardError, "one bool or 2"),
        (lambda: na2d(Q, K[:, :8], V[:, :8], 3), ShapeMismatch, "one batch and grid"),
        (lambda: na2d(Q[..., :3, :], K, V, 3), ShapeMismatch, "divide those of q"),
        (lambda: na2d(Q.float(), K, V, 3), ShapeMismatch, "one dtype"),
        (lambda: na1d(Q, K, V, 3), ShapeMismatch, "q must be floating-point .batch, X1, heads, dim."),
        (lambda: na2d(Q, K, V, 3, rpb=TABLE, is_causal=True), RegardError, "rpb was given with is_causal"),
        (lambda: na2d(Q, K, V, 5, rpb=TABLE), ShapeMismatch, "rpb must be .4, 9, 9."),
        (lambda: na2d(Q, K, V, 3, additional_keys=MORE), RegardError, "must be given together"),
        (
            lambda: na2d(Q, K, V, 3, additional_keys=MORE, additional_values=MORE),
            ShapeMismatch,
            "8 and 6. of",
        ),
        (lambda: na2d(Q, K, V, 3, impl="cuda"), RegardError, "impl is 'cuda'"),
        (lambda: na2d(Q, K, V, 3, impl="flex"), RegardError, "for a GPU"),
        (lambda: na2d(Q, K, V, 3, impl="index", rpb=TABLE), RegardError, "adds no rpb"),
        (lambda: neighborhood_mask((4, 4, 4, 4), 2), RegardError, "1 to 3 numbers"),
        (lambda: natten2dqkrpb(Q, K, None, 3), ShapeMismatch, "of one shape"),
        (lambda: natten2dqkrpb(Q, Q, None, 4), RegardError, "must be odd"),
        (lambda: natten2dav(Q, Q, 3), ShapeMismatch, "attention must be"),
        (lambda: Neighborhood(1), RegardError, "kernel_size is 1"),
        (lambda: NeighborhoodGrid(dim=8, heads=3, kernel_size=3), RegardError, "3 heads do not divide"),
        (lambda: NeighborhoodGrid(dim=8, heads=2, kernel_size=3, axes=4), RegardError, "must be 1, 2 or 3"),
        (
            lambda: NeighborhoodGrid(dim=8, heads=2, kernel_size=3, is_causal=True, position_bias=True),
            RegardError,
            "position_bias was given with is_causal",
        ),
        (lambda: NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 9, 8)), ShapeMismatch, "2 axes, 8"),
        (lambda: NeighborhoodAttention2D(8, 2, 3).step(torch.zeros(1, 9, 8)), RegardError, "can decode"),
        (
            lambda: NeighborhoodAttention1D(8, 2, 4, 2, is_causal=True).step(torch.zeros(1, 9, 8)),
            RegardError,
            "stride 1",
        ),
        (
            lambda: Neighborhood(3).build()(LINE[0], LINE[1][:, :, :1], LINE[2][:, :, :1], _full(LINE)),
            ShapeMismatch,
            "found on one sequence",
        ),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()


def _full(given):
    return Context.of(given[0], given[1][:, :, :1], causal=False)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7, 6), {"kernel_size": (5, 3), "position_bias": True}),
        ((8, 9), {"kernel_size": 4, "dilation": (2, 1), "stride": (1, 2)}),
        ((6, 7), {"kernel_size": 3, "is_causal": (True, False)}),
    ],
)
def test_rows_of_a_plane_are_the_weights_that_the_layer_uses(grid, options):
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, **options).double()
    if layer.rpb is not None:
        torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    assert layer.grids(x) == (grid, grid) and layer.shows == "rows"
    rows = layer.rows(x, range(grid[0] * grid[1]))
    values = layer.qkv(x).unflatten(-1, (3, 2, 4))[..., 2, :, :].flatten(1, 2).transpose(1, 2)
    out = layer.proj((rows @ values).transpose(1, 2).flatten(2)).unflatten(1, grid)
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-12)
    given = {k: v for k, v in options.items() if k != "position_bias"}
    assert torch.equal(rows[0, 0] > 0, neighborhood_mask(grid, **given))


def test_rows_are_refused_away_from_a_plane():
    layer = NeighborhoodAttention1D(8, 2, kernel_size=3)
    assert layer.shows is None
    with pytest.raises(RegardError, match="no queries and keys on a plane"):
        layer.rows(torch.randn(1, 6, 8), [0])
    plane = NeighborhoodAttention2D(8, 2, kernel_size=3)
    with pytest.raises(RegardError, match="from 0 to 29"):
        plane.rows(torch.randn(1, 5, 6, 8), [30])
    with pytest.raises(ShapeMismatch):
        plane.rows(torch.randn(1, 5, 6, 9), [0])
