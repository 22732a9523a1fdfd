"""Attention to near keys: by tiles of every size it is dense attention under a mask, with its gradients."""

import itertools

import pytest
import torch

from regard.engines import grids, neighborhoods, tiles
from regard.engines.grids import Axis, runs, windows
from regard.engines.neighborhoods import attend_neighborhoods

CASES = {
    "sequence": (Axis(23, 5),),
    "causal": (Axis(23, 4, 2, 3, True),),
    "plane": (Axis(20, 5), Axis(17, 4, 2)),
    "dilated": (Axis(26, 5, 1, 5), Axis(15, 3, 3, 2)),
    "whole axes": (Axis(7, 7), Axis(9, 9)),
    "cut": (Axis(11, 5, border="cut"), Axis(13, 6, 4, border="cut")),
    "cut and causal": (Axis(13, 9, 4, 2, True, "cut"),),
    "volume": (Axis(9, 3, 2, 3), Axis(10, 4, 1, 2, True), Axis(11, 5, 5)),
}


def drawn(axes, heads=4, kv_heads=2, width=8, values=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(axes))
    grid = [axis.length for axis in axes]
    shapes = ((heads, width), (kv_heads, width), (kv_heads, values))
    return [torch.randn(2, *grid, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def seen_by(axes):
    """Which keys each query sees, from the words of the definition, query by query."""
    grid = [range(axis.length) for axis in axes]
    places = list(itertools.product(*grid))
    rows = []
    for query in places:
        own = [set(neighbours(axis, i)) for axis, i in zip(axes, query, strict=True)]
        rows.append([all(j in near for j, near in zip(key, own, strict=True)) for key in places])
    return torch.tensor(rows)


def neighbours(axis, i):
    g, p = i % axis.dilation, i // axis.dilation
    group = range(g, axis.length, axis.dilation)
    last = len(group) - 1
    if axis.border == "cut":
        block = p // axis.stride * axis.stride
        before = axis.kernel - axis.stride if axis.causal else axis.kernel // 2 - axis.stride // 2
        near = range(block - before, block - before + axis.kernel)
        return [group[t] for t in near if 0 <= t <= (p if axis.causal else last)]
    if axis.causal:
        leader = min(p // axis.stride * axis.stride + axis.stride - 1, last)
        return [group[t] for t in range(max(leader - axis.kernel + 1, 0), p + 1)]
    leader = min(p // axis.stride * axis.stride + axis.stride // 2, last)
    start = min(max(leader - axis.kernel // 2, 0), last + 1 - axis.kernel)
    return [group[t] for t in range(start, start + axis.kernel)]


def dense(q, k, v, seen, scale, bias=None):
    heads, kv_heads = q.shape[-2], k.shape[-2]
    q_, k_, v_ = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    k_, v_ = (x.repeat_interleave(heads // kv_heads, 1) for x in (k_, v_))
    scores = q_ @ k_.transpose(-1, -2) * scale
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) @ v_).transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])
    return out, scores.logsumexp(-1).transpose(1, 2).reshape(q.shape[:-1])


def both(way, given):
    given = [x.clone().requires_grad_() for x in given]
    out, lse = way(*given)
    loss = (out.sin() * torch.linspace(0.5, 2, out.shape[-1], dtype=out.dtype)).sum() + lse.cos().sum()
    return [out, lse, *torch.autograd.grad(loss, given)]


@pytest.fixture
def small(monkeypatch):
    """Pieces so small that every loop over them runs more than once."""
    monkeypatch.setattr(tiles, "MOST_SCORES", 2000)
    monkeypatch.setattr(tiles, "MOST_STRIPS", 3000)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pieces", ["large", "small"])
def test_it_is_dense_attention_under_the_mask(name, pieces, request):
    if pieces == "small":
        request.getfixturevalue("small")
    axes = CASES[name]
    given, seen = drawn(axes), seen_by(axes)
    found = both(lambda q, k, v: attend_neighborhoods(q, k, v, axes, scale=0.4), given)
    expected = both(lambda q, k, v: dense(q, k, v, seen, 0.4), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    with torch.no_grad():
        again = attend_neighborhoods(*given, axes, scale=0.4)
    torch.testing.assert_close(again[0], expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", ["sequence", "plane", "dilated", "volume"])
def test_tiles_of_any_size_give_the_same(size, name, monkeypatch, small):
    axes = CASES[name]
    given = drawn(axes, dtype=torch.float32)
    expected = attend_neighborhoods(*given, axes, scale=0.4)
    monkeypatch.setattr(tiles, "tile_of", lambda rules, lengths, *_: tuple(min(size, n) for n in lengths))
    for one, other in zip(attend_neighborhoods(*given, axes, scale=0.4), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["sequence", "plane", "dilated"])
def test_a_bias_by_distance_and_its_gradient(name, small):
    axes = CASES[name]
    table = torch.randn(4, *(2 * axis.kernel - 1 for axis in axes), dtype=torch.float64)
    places = list(itertools.product(*(range(axis.length) for axis in axes)))

    def entry(query, key):
        apart = [
            (j // a.dilation - i // a.dilation) + a.kernel - 1
            for i, j, a in zip(query, key, axes, strict=True)
        ]
        fits = all(0 <= t < 2 * a.kernel - 1 for t, a in zip(apart, axes, strict=True))
        return apart if fits else [0] * len(apart)

    index = torch.tensor([[entry(query, key) for key in places] for query in places]).unbind(-1)
    given, seen = [*drawn(axes), table], seen_by(axes)
    found = both(lambda q, k, v, b: attend_neighborhoods(q, k, v, axes, scale=0.4, bias=b), given)
    expected = both(lambda q, k, v, b: dense(q, k, v, seen, 0.4, b[:, *index]), given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_gradients_are_those_of_finite_differences():
    axes = (Axis(5, 3), Axis(4, 2, 1, 2))
    given = [x.requires_grad_() for x in drawn(axes, heads=2, kv_heads=1, width=2, values=3)]
    assert torch.autograd.gradcheck(lambda *x: attend_neighborhoods(*x, axes, scale=0.7), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_great_scores_neither_overflow_nor_vanish(dtype):
    axes = CASES["plane"]
    q, k, v = drawn(axes, dtype=dtype)
    for scale in (1e4, 1e-30, -300.0):
        found = attend_neighborhoods(q, k, v, axes, scale=scale)
        expected = dense(*(x.double() for x in (q, k, v)), seen_by(axes), scale)
        torch.testing.assert_close(
            found[0].double(), expected[0], rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-9
        )
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    axes = CASES["plane"]
    given = drawn(axes, dtype=dtype)
    exact = attend_neighborhoods(*(x.float() for x in given), axes, scale=0.4)
    out, lse = attend_neighborhoods(*given, axes, scale=0.4)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, exact[0].to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(lse, exact[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 6, 5), (1, 0, 5), (1, 6, 0)])
def test_nothing_in_is_nothing_out(shape):
    q = torch.randn(*shape, 2, 4, requires_grad=True)
    axes = tuple(Axis(n, 3) for n in shape[1:])
    out, lse = attend_neighborhoods(q, q, q, axes, scale=1.0)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    out.sum().backward()


def test_strides_of_inputs_do_not_matter():
    axes = CASES["plane"]
    given = drawn(axes)
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in given]
    expected = attend_neighborhoods(*given, axes, scale=0.4)[0]
    for way in (odd, wide, [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in given]):
        torch.testing.assert_close(attend_neighborhoods(*way, axes, scale=0.4)[0], expected, rtol=0, atol=0)


def test_what_a_thread_keeps_is_bounded(monkeypatch):
    monkeypatch.setattr(tiles, "KEPT", 100)
    axes = CASES["plane"]
    attend_neighborhoods(*drawn(axes), axes, scale=0.4)
    assert all(x.numel() <= 100 for x in tiles._rooms_of(torch.float64).values())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 4, 6, 50])
def test_runs_hold_every_query_once_and_all_its_keys(stride, causal, size):
    start, stop = windows(41, 6, stride, causal)
    found = {}
    for run in runs(41, 6, stride, causal, size):
        for tile in range(run.count):
            for row in range(run.size):
                query = run.first + tile * run.size + row
                keys = (run.start + tile * run.size + run.visible[row].nonzero()[:, 0]).tolist()
                assert query not in found
                found[query] = keys
    assert found == {i: list(range(start[i], stop[i])) for i in range(41)}


def test_a_tile_is_chosen_by_its_cost():
    axes = (Axis(112, 13), Axis(112, 13))
    tile = grids.tile_of(axes, (112, 112), 4, 1, 64)
    assert 16 <= tile[0] * tile[1] <= 256
    assert grids.tile_of((Axis(7, 7), Axis(7, 7)), (7, 7), 4, 1, 64) == (7, 7), "a small plane is one tile"


def test_nothing_grows_with_the_square_of_the_tokens():
    """The largest tensor made inside stays as large when the sequence is four times as long."""
    q = torch.randn(1, 8192, 1, 8)
    kept = tiles._rooms_of(torch.float32)
    kept.clear()
    attend_neighborhoods(q, q, q, (Axis(8192, 9),), scale=1.0)
    assert max(x.numel() for x in kept.values()) <= tiles.MOST_SCORES + neighborhoods.LN2
