"""Attention of blocks to windows: by every rule of borders it is attention query by query, with gradients."""

import itertools

import pytest
import torch

from regard.engines import window_parts, windows
from regard.engines.grids import Axis
from regard.engines.neighborhoods import attend_neighborhoods
from regard.engines.windows import attend_windows
from regard.errors import RegardError

CASES = {
    "zeros": ((Axis(8, 8, 4, border="zero"), Axis(6, 4, 2, border="zero")), {}),
    "cut": ((Axis(6, 5, 3, border="cut"), Axis(8, 4, 2, border="cut")), {}),
    "short last blocks": ((Axis(6, 8, 4, border="cut"), Axis(8, 5, 3, border="zero")), {}),
    "every second query": ((Axis(8, 8, 4, border="zero"), Axis(12, 10, 6, border="zero")), {"every": 2}),
    "true offsets": ((Axis(7, 8, 4, border="cut"), Axis(12, 10, 6, border="cut")), {"every": 2, "reach": 2}),
    "causal": ((Axis(11, 7, 4, causal=True, border="cut"),), {}),
    "causal, zeros": ((Axis(12, 7, 4, causal=True, border="zero"),), {}),
    "single pixels": ((Axis(6, 5, 1, border="zero"), Axis(5, 3, 1, border="cut")), {}),
    "wide halo": ((Axis(4, 12, 4, border="zero"), Axis(3, 9, 3, border="cut")), {}),
    "volume": ((Axis(4, 4, 2, border="zero"), Axis(4, 4, 2, border="cut"), Axis(3, 3, 3, border="cut")), {}),
}


def drawn(axes, every=1, dtype=torch.float64, width=5, values=3):
    generator = torch.Generator().manual_seed(len(axes))
    grid = [axis.length for axis in axes]
    fewer = [-(-n // every) for n in grid]
    shapes = [(2, *g, 2, d) for g, d in ((fewer, width), (grid, width), (grid, values))]
    shapes += [(2 * axis.kernel - 1, width) for axis in axes]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def keys_of(axis, i, every, reach):
    """The keys of query i along an axis, None for one of zeros, and their rows in a table."""
    at = i * every
    first = at // axis.stride * axis.stride
    halo = axis.kernel - axis.stride if axis.causal else (axis.kernel - axis.stride) // 2
    found = []
    for u in range(axis.kernel):
        key = first - halo + u
        inside = 0 <= key < axis.length
        shut = axis.border == "cut" or (key >= axis.length and axis.length % axis.stride)
        if (axis.causal and key > at) or (not inside and shut):
            continue
        found.append((key if inside else None, axis.kernel - 1 + u - reach * ((at - first) // every)))
    return found


def one_by_one(q, k, v, axes, scale, tables=(), every=1, reach=1):
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[:-1], dtype=q.dtype)
    for place in itertools.product(*map(range, q.shape[1:-2])):
        near = (keys_of(axis, i, every, reach) for axis, i in zip(axes, place, strict=True))
        scores, values = [], []
        for keys in itertools.product(*near):
            query, key = q[:, *place], [at for at, _ in keys]
            there = None not in key
            score = scale * (query * k[:, *key]).sum(-1) if there else torch.zeros_like(query[..., 0])
            for table, (_, row) in zip(tables, keys, strict=False):
                score = score + query @ table[row]
            scores.append(score)
            values.append(v[:, *key] if there else torch.zeros_like(v[(slice(None), *[0] * len(axes))]))
        weights = torch.stack(scores, -1)
        out[:, *place] = (weights.softmax(-1)[..., None, :] @ torch.stack(values, -2))[..., 0, :]
        lse[:, *place] = weights.logsumexp(-1)
    return out, lse


def both(way, given):
    given = [x.clone().requires_grad_() for x in given]
    out, lse = way(*given)
    loss = (out.sin() * torch.linspace(0.5, 2, out.shape[-1], dtype=out.dtype)).sum() + lse.cos().sum()
    return [out, lse, *torch.autograd.grad(loss, given)]


@pytest.fixture
def small(monkeypatch):
    """Pieces so small that every loop over them runs more than once."""
    monkeypatch.setattr(window_parts, "MOST_SCORES", 900)
    monkeypatch.setattr(window_parts, "MOST_ROWS", 1500)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("pieces", ["large", "small"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_query_by_query(name, pieces, placed, request):
    if pieces == "small":
        request.getfixturevalue("small")
    axes, options = CASES[name]
    given = drawn(axes, options.get("every", 1))[: None if placed else 3]
    found, expected = (
        both(lambda q, k, v, *t, way=way: way(q, k, v, axes, scale=0.7, tables=t, **options), given)
        for way in (attend_windows, one_by_one)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_is_cut_is_the_same_by_tiles_that_move_with_the_query():
    axes, _ = CASES["cut"]
    q, k, v, *_ = drawn(axes)
    for one, other in zip(
        attend_windows(q, k, v, axes, scale=0.3), attend_neighborhoods(q, k, v, axes, scale=0.3), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    axes = (Axis(4, 4, 2, border="zero"), Axis(3, 3, 1, border="cut"))
    given = [x.requires_grad_() for x in drawn(axes, width=2, values=2)]

    def attend(q, k, v, *tables):
        return attend_windows(q, k, v, axes, scale=0.7, tables=tables)

    assert torch.autograd.gradcheck(attend, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e3, -300.0, 1e-30])
def test_great_scores_neither_overflow_nor_vanish(dtype, scale):
    axes, _ = CASES["cut"]
    q, k, v, *_ = drawn(axes, dtype=dtype)
    out, lse = attend_windows(q, k, v, axes, scale=scale)
    expected = one_by_one(q.double(), k.double(), v.double(), axes, scale)
    torch.testing.assert_close(
        out.double(), expected[0], rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-9
    )
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    low = attend_windows(q - 30 * k.sum(), k, v, axes, scale=-3.0)[0]
    assert low.isfinite().all(), "where every sum of plain powers would be 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    axes, _ = CASES["zeros"]
    q, k, v, *tables = drawn(axes, dtype=dtype)
    out, lse = attend_windows(q, k, v, axes, scale=0.4, tables=tuple(tables))
    exact = attend_windows(*(x.float() for x in (q, k, v)), axes, scale=0.4, tables=tuple(tables))
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, exact[0].to(dtype))


def test_memory_that_held_other_numbers_before_changes_nothing():
    axes, _ = CASES["zeros"]
    given = drawn(axes)
    first = both(lambda *x: attend_windows(*x[:3], axes, scale=0.3, tables=x[3:]), given)
    for x in windows.Room(given[0].new_empty(0))._kept.values():
        x.fill_(float("nan"))
    again = both(lambda *x: attend_windows(*x[:3], axes, scale=0.3, tables=x[3:]), given)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_an_empty_batch():
    axes, _ = CASES["zeros"]
    q, k, v, *_ = (x[:0].requires_grad_() for x in drawn(axes))
    out, lse = attend_windows(q, k, v, axes, scale=0.3)
    assert out.shape == (0, 8, 6, 2, 3) and lse.shape == (0, 8, 6, 2)
    assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape


def test_rules_that_are_not_of_blocks_are_refused():
    q, k, v, *_ = drawn((Axis(8, 3),))
    with pytest.raises(RegardError, match="border must be cut or zero"):
        attend_windows(q, k, v, (Axis(8, 3),), scale=1.0)
    with pytest.raises(RegardError, match="every is 2; it must divide the stride, 3"):
        attend_windows(q[:, ::2], k, v, (Axis(8, 5, 3, border="cut"),), scale=1.0, every=2)
    with pytest.raises(RegardError, match="must be clamped or cut"):
        attend_neighborhoods(q, k, v, (Axis(8, 3, border="zero"),), scale=1.0)
