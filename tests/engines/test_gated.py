"""The first-order recurrence by doubling is the loop, with its gradients, states and extreme gates."""

import pytest
import torch

from regard.engines.gated import gated_scan
from regard.errors import ShapeMismatch


def loop(a, b, state):
    outputs = []
    for i in range(a.shape[1]):
        state = a[:, i] * state + b[:, i]
        outputs.append(state)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
def test_it_is_the_loop_with_its_gradients(length):
    torch.manual_seed(length)
    made = [torch.randn(s, dtype=torch.float64) for s in ([2, length, 3],) * 2 + ([2, 3],)]
    given = [x.requires_grad_() for x in made]
    found, last = gated_scan(*given)
    expected = loop(*given)
    torch.testing.assert_close(found, expected)
    assert torch.equal(last, found[:, -1])
    gradients = [torch.autograd.grad(out.sin().sum(), given) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gates_of_nothing_and_all():
    b = torch.ones(1, 5, 1)
    assert gated_scan(torch.zeros(1, 5, 1), b)[0].flatten().tolist() == [1] * 5
    assert gated_scan(torch.ones(1, 5, 1), b)[0].flatten().tolist() == [1, 2, 3, 4, 5]
    assert gated_scan(torch.tensor([1e-30]).expand(1, 500, 1), torch.ones(1, 500, 1))[0].isfinite().all()
    out, state = gated_scan(b[:, :0], b[:, :0], torch.full((1, 1), 3.0))
    assert out.shape == (1, 0, 1) and state.item() == 3


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeMismatch, match="a and b"):
        gated_scan(torch.ones(1, 5, 1), torch.ones(1, 4, 1))
    with pytest.raises(ShapeMismatch, match="the state must be"):
        gated_scan(torch.ones(1, 5, 1), torch.ones(1, 5, 1), torch.ones(1, 2))
