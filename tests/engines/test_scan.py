"""The chunked recurrence against the same thing one position at a time."""

import pytest
import torch

from regard.engines.scan import linear_scan


def inputs(length, heads=4, kv_heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = draw(2, heads, length, 5), draw(2, kv_heads, length, 5)
    return q, k, draw(2, kv_heads, length, 3), draw(2, kv_heads, 5, 3)


def naive(q, k, v, state):
    """S_i = S_{i-1} + k_i v_i^T, out_i = q_i S_i."""
    group = q.shape[1] // k.shape[1]
    out = []
    for i in range(q.shape[2]):
        state = state + k[:, :, i, :, None] * v[:, :, i, None]
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], state.repeat_interleave(group, 1)))
    return torch.stack(out, 2) if out else q.new_zeros(*q.shape[:3], v.shape[3]), state


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("length", [1, 2, 7, 20, 65])
def test_chunks_equal_the_recurrence(length, chunk, kv_heads):
    q, k, v, state = inputs(length, kv_heads=kv_heads)
    for start in (None, state):
        found = linear_scan(q, k, v, start, chunk)
        expected = naive(q, k, v, torch.zeros_like(state) if start is None else start)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_segments_equal_the_whole():
    q, k, v, state = inputs(41)
    whole, last = linear_scan(q, k, v, state)
    parts, now = [], state
    for start, stop in ((0, 1), (1, 1), (1, 14), (14, 40), (40, 41)):
        out, now = linear_scan(*(x[:, :, start:stop] for x in (q, k, v)), now, chunk=8)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(now, last, rtol=1e-12, atol=1e-12)


def test_nothing_in_leaves_the_state_as_it_was():
    q, k, v, state = inputs(0)
    out, last = linear_scan(q, k, v, state)
    assert out.shape == (2, 4, 0, 3) and torch.equal(last, state)
    assert torch.equal(linear_scan(q, k, v)[1], torch.zeros_like(state))


def test_keys_of_zero_write_nothing():
    q, k, v, state = inputs(20)
    k[:, :, 5:12] = 0
    keep = [*range(5), *range(12, 20)]
    out, last = linear_scan(q, k, v, state, chunk=4)
    short, end = linear_scan(*(x[:, :, keep] for x in (q, k, v)), state, chunk=4)
    torch.testing.assert_close(out[:, :, keep], short, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_recurrence():
    given = [x[:1].requires_grad_() for x in inputs(9)]
    assert torch.autograd.gradcheck(lambda *x: linear_scan(*x, chunk=4), given)
    pairs = [
        torch.autograd.grad(out.sin().sum() + last.cos().sum(), given)
        for out, last in (linear_scan(*given, chunk=4), naive(*given))
    ]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32(dtype):
    q, k, v, _ = inputs(300, dtype=dtype)
    out, last = linear_scan(q, k, v)
    assert out.dtype == last.dtype == torch.float32
    exact, end = linear_scan(q.double(), k.double(), v.double())
    assert (out - exact).abs().max() < 2e-6 * exact.abs().max()
    assert (last - end).abs().max() < 2e-6 * end.abs().max()


def test_no_later_position_moves_an_earlier_one():
    q, k, v, state = inputs(20)
    before = linear_scan(q, k, v, state, 6)[0]
    for x in (q, k, v):
        x[:, :, 11:] += 100
    assert torch.equal(linear_scan(q, k, v, state, 6)[0][:, :, :11], before[:, :, :11])
