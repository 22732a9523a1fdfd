"""redistribute against its definition, key by key."""

import pytest
import torch

import regard
from regard.edit import EditWeights, redistribute
from regard.errors import RegardError, ShapeMismatch
from tests.edit.plain import changed, close, logits
from tests.support.families import FAMILIES


def by_hand(weights, giving, receiving, fraction, gate):
    """The equation, one row and key at a time; all arguments of the full shape."""
    found = weights.clone()
    for row in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape[:-1])).tolist():
        at = tuple(row)
        takers = [j for j in range(weights.shape[-1]) if receiving[at][j] and not giving[at][j]]
        givers = [j for j in range(weights.shape[-1]) if giving[at][j]]
        held = sum(float(weights[at][j]) for j in takers)
        part = float(fraction[at]) * float(gate[at])
        if held == 0:
            continue
        moved = part * sum(float(weights[at][j]) for j in givers)
        for j in givers:
            found[at][j] = (1 - part) * weights[at][j]
        for j in takers:
            found[at][j] = weights[at][j] * (1 + moved / held)
    return found


def sample():
    weights = torch.rand(2, 3, 4, 6).softmax(-1)
    weights[0, 1, 2] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    giving = torch.rand(2, 1, 1, 6) < 0.4
    giving[..., 0] = True
    return weights, giving, torch.rand(3, 4, 6) < 0.6


@pytest.mark.parametrize("kind", ["number", "a row", "a head"])
@pytest.mark.parametrize("gated", [None, "bool", "soft"])
def test_equals_the_definition(kind, gated):
    weights, giving, receiving = sample()
    fraction = {"number": 0.3, "a row": torch.rand(4, 1), "a head": torch.rand(3, 1, 1)}[kind]
    gate = {None: None, "bool": torch.rand(2, 1, 4) < 0.5, "soft": torch.rand(3, 1)}[gated]
    found = redistribute(weights, giving, receiving, fraction, gate)
    full = weights.shape
    expected = by_hand(
        weights.double(), giving.expand(full), receiving.expand(full),
        torch.as_tensor(fraction).expand(2, 3, 4, 1)[..., 0],
        (torch.ones(1) if gate is None else gate).expand(2, 3, 4),
    )  # fmt: skip
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.allclose(found.sum(-1), weights.sum(-1))
    assert not torch.allclose(found, weights, atol=1e-3)


def test_a_row_with_nothing_to_receive_stays():
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.3, 0.2]])
    giving = torch.tensor([True, True, False])
    found = redistribute(weights, giving, ~giving, 0.5)
    assert torch.equal(found[0], weights[0])
    assert torch.allclose(found[1], torch.tensor([0.25, 0.15, 0.6]))


def test_a_key_in_both_masks_gives_and_does_not_receive():
    weights = torch.tensor([0.6, 0.1, 0.3])
    found = redistribute(weights, torch.tensor([True, False, False]), torch.ones(3).bool(), 1.0)
    assert torch.allclose(found, torch.tensor([0.0, 0.25, 0.75]))


def test_the_ends_of_fraction():
    weights, giving, receiving = sample()
    assert torch.equal(redistribute(weights, giving, receiving, 0.0), weights)
    everything = redistribute(weights, giving, ~giving, 1)
    rows = (weights * ~giving).sum(-1) > 0
    assert (everything * giving).sum(-1)[rows].abs().max() < 1e-6


def test_rows_below_one_keep_their_sum():
    """Beside a sink logit a row sums to less than 1."""
    weights, giving, receiving = sample()
    found = redistribute(0.4 * weights, giving, receiving, 0.8)
    assert torch.allclose(found, 0.4 * redistribute(weights, giving, receiving, 0.8), atol=1e-7)


def test_gradients_flow_to_weights_and_fraction():
    weights = torch.rand(2, 3, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    fraction = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    giving = torch.tensor([True, False, False, True, False])
    receiving = torch.tensor([False, True, False, False, True])
    assert torch.autograd.gradcheck(lambda w, f: redistribute(w, giving, receiving, f), (weights, fraction))
    empty = torch.tensor([[1.0, 0.0]], requires_grad=True)
    redistribute(empty, torch.tensor([True, False]), torch.tensor([False, True]), 0.5).sum().backward()
    assert torch.isfinite(empty.grad).all()


def test_dtype_and_argument_stay():
    weights, giving, receiving = sample()
    before = weights.clone()
    assert redistribute(weights.bfloat16(), giving, receiving, 0.5).dtype == torch.bfloat16
    redistribute(weights, giving, receiving, 0.5)
    assert torch.equal(weights, before)


def test_inside_a_model():
    """Half of what the first token gets goes to the others, under left padding."""
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model, "left")

    def away_from_first(weights, block):
        first = (block.key_positions == 0)[:, None, None, :]
        return redistribute(weights, first, ~first, 0.5)

    def plainly(layer, weights, module):
        for row, start in enumerate((3, 0)):
            part = weights[row, :, start:, start:]
            rest = part[..., 1:].sum(-1, keepdim=True)
            gain = torch.where(rest > 0, 0.5 * part[..., :1] / rest, torch.zeros(()))
            part[..., :1] *= torch.where(rest > 0, 0.5, 1.0)
            part[..., 1:] *= 1 + gain
        return weights

    with changed(model, weights=plainly):
        expected = logits(model, inputs)
    with regard.steer(model, EditWeights(away_from_first)):
        assert close(logits(model, inputs), expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"fraction": 1.2}, RegardError, "between 0 and 1"),
        ({"fraction": -0.1}, RegardError, "between 0 and 1"),
        ({"fraction": float("nan")}, RegardError, "between 0 and 1"),
        ({"fraction": torch.rand(6)}, ShapeMismatch, r"fraction has shape \(6,\)"),
        ({"from_mask": torch.ones(6)}, RegardError, "from_mask has dtype"),
        ({"to_mask": torch.ones(5).bool()}, ShapeMismatch, "to_mask has shape"),
        ({"from_mask": torch.ones(2, 2, 3, 4, 6).bool()}, ShapeMismatch, "from_mask has shape"),
        ({"row_gate": torch.ones(6)}, ShapeMismatch, "row_gate has shape"),
    ],
)
def test_unfit_arguments_are_refused(change, error, match):
    weights, giving, receiving = sample()
    given = {"from_mask": giving, "to_mask": receiving, "fraction": 0.5, **change}
    with pytest.raises(error, match=match):
        redistribute(weights, **given)
