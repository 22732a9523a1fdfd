"""Depthwise convolution: equal to the sum over taps, forward and backward, in every way it is computed."""

import pytest
import torch

from regard.engines.depthwise import before, depthwise

CASES = {
    "line": ((2, 3, 19), (7,), 3),
    "even line": ((2, 3, 12), (4,), 3),
    "plane": ((2, 3, 9, 17), (7, 7), 3),
    "plane in pieces": ((2, 2, 5, 31), (5, 7), 2),
    "plane, undilated": ((2, 3, 9, 8), (5, 5), 1),
    "even plane": ((2, 3, 9, 33), (4, 6), 3),
    "one position": ((1, 3, 1, 1), (7, 7), 3),
    "volume": ((2, 3, 6, 5, 7), (7, 3, 7), 3),
    "even volume": ((1, 2, 5, 4, 6), (4, 4, 4), 1),
}


def as_a_sum(x, weight, bias, dilation):
    """Each output as it is defined, tap by tap."""
    out = torch.zeros_like(x) + bias.view(-1, *[1] * (x.ndim - 2))
    shape = x.shape[2:]
    for tap in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape[2:])).view(-1, x.ndim - 2):
        moved = [int(t) * dilation - before(n, dilation) for t, n in zip(tap, weight.shape[2:], strict=True)]
        kept = torch.ones(shape, dtype=torch.bool)
        for axis, step in enumerate(moved):
            at = torch.arange(shape[axis]) + step
            inside = (at >= 0) & (at < shape[axis])
            kept = kept & inside.view(*[-1 if i == axis else 1 for i in range(len(shape))])
        near = x.roll([-step for step in moved], list(range(2, x.ndim))) * kept
        out = out + weight[(slice(None), 0, *tap)].view(-1, *[1] * len(shape)) * near
    return out


def drawn(shape, taps, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (shape[1], 1, *taps), (shape[1],))
    found = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.to(dtype).requires_grad_() for x in found]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_sum_over_taps_with_its_gradients(name, dtype, bound):
    shape, taps, dilation = CASES[name]
    given, exact = drawn(shape, taps, dtype), drawn(shape, taps, torch.float64)
    found, expected = depthwise(*given, dilation=dilation), as_a_sum(*exact, dilation)
    assert found.dtype == dtype and found.shape == torch.Size(shape)
    pairs = zip(
        (found, *torch.autograd.grad(found.sin().sum(), given)),
        (expected, *torch.autograd.grad(expected.sin().sum(), exact)),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


def test_gradients_have_gradients_and_can_be_mapped():
    x, weight, bias = drawn((1, 2, 4, 5), (3, 3), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *given: depthwise(*given, dilation=2), (x, weight, bias))
    jacobian = torch.func.jacrev(lambda x: depthwise(x, weight.detach(), dilation=2))(x.detach())
    rows = torch.autograd.functional.jacobian(lambda x: depthwise(x, weight.detach(), dilation=2), x.detach())
    torch.testing.assert_close(jacobian, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    given = [x.detach() for x in drawn((2, 3, 9, 17), (7, 7), dtype)]
    found = depthwise(*given, dilation=3)
    wide = depthwise(*(x.float() for x in given), dilation=3)
    assert found.dtype == dtype and torch.equal(found, wide.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(depthwise(*(x.float() for x in given), dilation=3), wide)


def test_memory_format_and_other_devices():
    x, weight, bias = (t.detach() for t in drawn((2, 3, 9, 17), (7, 7), torch.float32))
    last = depthwise(x.contiguous(memory_format=torch.channels_last), weight, bias, dilation=3)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, depthwise(x, weight, bias, dilation=3), rtol=0, atol=1e-4)
    for name, (shape, taps, dilation) in CASES.items():
        hollow = [t.detach().to("meta") for t in drawn(shape, taps, torch.float32)]
        assert depthwise(*hollow, dilation=dilation).shape == torch.Size(shape), name
