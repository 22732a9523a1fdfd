"""The chunked recurrence against the same thing one position at a time."""

import pytest
import torch

from regard.engines.pieces import NUMBERS
from regard.engines.scan import scan
from regard.errors import RegardError, ShapeMismatch

DECAYS = ["none", "head", "step", "channel"]


def inputs(length, heads=4, kv_heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = draw(2, heads, length, 5), draw(2, kv_heads, length, 5)
    return q, k, draw(2, kv_heads, length, 3), draw(2, kv_heads, 5, 3)


def decay_of(kind, length, kv_heads=2, strength=1.0, dtype=torch.float64):
    if kind == "none":
        return None
    shape = {"head": (kv_heads,), "step": (2, kv_heads, length), "channel": (2, kv_heads, length, 5)}
    generator = torch.Generator().manual_seed(7)
    return -strength * torch.rand(shape[kind], generator=generator, dtype=torch.float64).to(dtype)


def share(decay, i):
    """exp of the decay at position i, [B|1, Hkv|1, D|1]."""
    if decay is None:
        return torch.ones(1, 1, 1)
    return (decay[None, :, None] if decay.ndim == 1 else decay[:, :, i].view(*decay.shape[:2], -1)).exp()


def naive(q, k, v, decay, state, valid=None, starts=None):
    """S_i = diag(a_i) S_{i-1} + k_i v_i^T, out_i = q_i S_i, a position at a time."""
    group, out = q.shape[1] // k.shape[1], []
    for i in range(q.shape[2]):
        a = share(decay, i)
        new = a[..., None] * (state * ~starts[:, i, None, None, None] if starts is not None else state)
        new = new + k[:, :, i, :, None] * v[:, :, i, None]
        state = new if valid is None else torch.where(valid[:, i, None, None, None], new, state)
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], state.repeat_interleave(group, 1)))
    return torch.stack(out, 2) if out else q.new_zeros(*q.shape[:3], v.shape[3]), state


def same(found, expected, bound=1e-11):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("chunk", [1, 2, 4, 32, 64])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 100])
def test_chunks_equal_the_recurrence(length, chunk, kind):
    for kv_heads in (1, 4) if length == 7 else (2,):
        q, k, v, state = inputs(length, kv_heads=kv_heads)
        decay = decay_of(kind, length, kv_heads)
        for start in (None, state):
            expected = naive(q, k, v, decay, torch.zeros_like(state) if start is None else start)
            same(scan(q, k, v, decay, start, chunk=chunk), expected)


@pytest.mark.parametrize("kind", DECAYS)
def test_padding_writes_nothing_and_ages_nothing(kind):
    q, k, v, state = inputs(75)
    decay = decay_of(kind, 75)
    valid = torch.rand(2, 75) > 0.4
    for chunk in (8, 64):
        found = scan(q, k, v, decay, state, valid=valid, chunk=chunk)
        same(found, naive(q, k, v, decay, state, valid))
        for item in range(2):
            keep = valid[item]
            parts = [x[item : item + 1, :, keep] for x in (q, k, v)]
            short = decay if kind in ("none", "head") else decay[item : item + 1, :, keep]
            out, last = scan(*parts, short, state[item : item + 1], chunk=chunk)
            same((found[0][item : item + 1, :, keep], found[1][item : item + 1]), (out, last))


@pytest.mark.parametrize("kind", DECAYS)
def test_packed_sequences_do_not_see_each_other(kind):
    q, k, v, state = inputs(90)
    decay = decay_of(kind, 90)
    starts = torch.zeros(2, 90, dtype=torch.bool)
    starts[0, [20, 21, 70]] = True
    starts[1, [0, 64]] = True
    for chunk in (8, 64):
        found = scan(q, k, v, decay, state, starts=starts, chunk=chunk)
        same(found, naive(q, k, v, decay, state, starts=starts))
    for start, stop in ((0, 20), (20, 21), (21, 70), (70, 90)):
        parts = [x[:1, :, start:stop] for x in (q, k, v)]
        short = decay if kind in ("none", "head") else decay[:1, :, start:stop]
        out, last = scan(*parts, short, state[:1] if start == 0 else None)
        torch.testing.assert_close(found[0][:1, :, start:stop], out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1][:1], last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", DECAYS)
def test_segments_equal_the_whole(kind):
    q, k, v, state = inputs(101)
    decay = decay_of(kind, 101)
    whole, last = scan(q, k, v, decay, state)
    parts, now = [], state
    for start, stop in ((0, 1), (1, 1), (1, 34), (34, 100), (100, 101)):
        short = decay if kind in ("none", "head") else decay[:, :, start:stop]
        out, now = scan(*(x[:, :, start:stop] for x in (q, k, v)), short, now, chunk=8)
        parts.append(out)
    same((torch.cat(parts, 2), now), (whole, last))


@pytest.mark.parametrize("kind", DECAYS)
def test_pieces_that_a_cache_holds_equal_the_whole(kind, monkeypatch):
    q, k, v, state = inputs(107)
    decay = decay_of(kind, 107)
    expected = naive(q, k, v, decay, state)
    for numbers in (1, 1000, 10**9):
        monkeypatch.setitem(NUMBERS, "cpu", numbers)
        same(scan(q, k, v, decay, state, chunk=8), expected)


@pytest.mark.parametrize("kind", DECAYS)
def test_nothing_in_leaves_the_state_as_it_was(kind):
    q, k, v, state = inputs(0)
    out, last = scan(q, k, v, decay_of(kind, 0), state)
    assert out.shape == (2, 4, 0, 3) and torch.equal(last, state)
    assert torch.equal(scan(q, k, v)[1], torch.zeros_like(state))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
def test_gradients_are_those_of_the_recurrence(kind, padded):
    length = 11
    given = [x[:1].requires_grad_() for x in inputs(length, 2, 1)]
    decay = decay_of(kind, length, 1)
    if decay is not None:
        decay = (decay if kind == "head" else decay[:1]).detach().requires_grad_()
        given.append(decay)
    valid = torch.arange(length)[None] != 5 if padded else None

    def run(function, q, k, v, state, decay=None):
        out, last = function(q, k, v, decay, state)
        return out.sin().sum() + last.cos().sum()

    chunked = torch.autograd.grad(run(lambda *x: scan(*x, valid=valid, chunk=16), *given), given)
    plain = torch.autograd.grad(run(lambda *x: naive(*x, valid), *given), given)
    same(chunked, plain, 1e-9)
    assert all(x.abs().sum() > 0 for x in plain)


@pytest.mark.parametrize("kind", DECAYS)
def test_gradcheck(kind):
    given = [x[:1].requires_grad_() for x in inputs(5, 2, 1)]
    decay = decay_of(kind, 5, 1)
    if decay is not None:
        given.insert(3, (decay if kind == "head" else decay[:1]).clone().requires_grad_())
    function = scan if decay is not None else lambda q, k, v, state: scan(q, k, v, None, state)
    assert torch.autograd.gradcheck(lambda *x: function(*x), given)


@pytest.mark.parametrize("kind", DECAYS[1:])
@pytest.mark.parametrize("strength", [80.0, 3000.0, torch.inf])
def test_no_decay_overflows(kind, strength):
    """Also in float32, and with the gradient; -inf forgets all that was before."""
    q, k, v, state = inputs(70, dtype=torch.float32)
    decay = decay_of(kind, 70, dtype=torch.float32)
    decay = torch.full_like(decay, -torch.inf) if strength == torch.inf else decay * strength
    if kind == "channel":
        decay = torch.where(torch.arange(70)[:, None] % 3 == 0, decay, -0.1)
    decay.requires_grad_()
    out, last = scan(q, k, v, decay, state)
    exact = naive(*(x.double() for x in (q, k, v, decay, state)))
    assert (out - exact[0]).abs().max() < 1e-5 * exact[0].abs().max()
    assert (last - exact[1]).abs().max() < 1e-5 * exact[1].abs().max().clamp(min=1)
    assert torch.isfinite(torch.autograd.grad(out.sum() + last.sum(), decay)[0]).all()


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_are_kept_in_float32(dtype, kind):
    q, k, v, _ = inputs(300, dtype=dtype)
    decay = decay_of(kind, 300, strength=0.02)
    out, last = scan(q, k, v, decay)
    assert out.dtype == last.dtype == torch.float32
    exact, end = scan(q.double(), k.double(), v.double(), decay)
    assert (out - exact).abs().max() < 3e-6 * exact.abs().max()
    assert (last - end).abs().max() < 3e-6 * end.abs().max()


@pytest.mark.parametrize("kind", DECAYS)
def test_bfloat16_rounds_products_but_not_states(kind):
    q, k, v, state = inputs(300, dtype=torch.bfloat16)
    decay = decay_of(kind, 300, strength=0.02)
    given = [x.requires_grad_() for x in (q, k, v)]
    out, last = scan(*given, decay, state)
    assert out.dtype == last.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in given]
    exact, end = scan(*wide, decay, state)
    found, expected = (torch.autograd.grad((o * o).sum(), x) for o, x in ((out, given), (exact, wide)))
    for one, other in zip((out, last, *found), (exact, end, *expected), strict=True):
        assert (one - other).abs().max() < 0.02 * other.abs().max()
    assert all(x.dtype == torch.bfloat16 for x in found)

    ones = torch.ones(1, 1, 64 * 600, 1, dtype=torch.bfloat16)
    added, total = scan(ones, ones, ones)
    assert total.item() == 64 * 600  # in bfloat16 it would stay at 64 * 256
    assert (added.flatten() / torch.arange(1, 64 * 600 + 1) - 1).abs().max() < 0.01


@pytest.mark.parametrize("kind", DECAYS)
def test_no_later_position_moves_an_earlier_one(kind):
    q, k, v, state = inputs(40)
    decay = decay_of(kind, 40)
    before = scan(q, k, v, decay, state, chunk=16)[0]
    for x in (q, k, v, *([] if kind in ("none", "head") else [decay])):
        x[:, :, 21:] -= 1
    assert torch.equal(scan(q, k, v, decay, state, chunk=16)[0][:, :, :21], before[:, :, :21])


BAD = [
    ({"k": torch.ones(2, 2, 4, 5)}, "k is .2, 2, 4, 5."),
    ({"v": torch.ones(2, 4, 6, 3)}, "v is"),
    ({"q": torch.ones(2, 3, 6, 5)}, "no multiple of the 2"),
    ({"decay": torch.zeros(3)}, "decay is .3."),
    ({"state": torch.zeros(2, 4, 5, 3)}, "state is"),
    ({"valid": torch.ones(2, 5, dtype=torch.bool)}, "valid is"),
    ({"starts": torch.ones(6, dtype=torch.bool)}, "starts is"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=[next(iter(w)) for w, _ in BAD])
def test_shapes_that_do_not_fit(wrong, words):
    q, k, v, _ = inputs(6)
    with pytest.raises(ShapeMismatch, match=words):
        scan(**{"q": q, "k": k, "v": v, **wrong})


def test_decays_and_chunks_that_cannot_be():
    q, k, v, _ = inputs(6)
    with pytest.raises(RegardError, match="above 0"):
        scan(q, k, v, torch.tensor([-0.1, 0.1]))
    for chunk in (0, 3, 8192):
        with pytest.raises(RegardError, match="power of two"):
            scan(q, k, v, chunk=chunk)
