"""Every row of the table is its mixer's own formula; maps, gauges and refusals; faults are caught."""

import re

import pytest
import torch
import torch.nn.functional as F

from regard.attention.dsf import LTV, assert_equivalent, decay_profile, effective_attention, rows, ssm
from regard.attention.dsf.faults import FAULTS, error_of, with_fault
from regard.attention.dsf.formulas import ROWS, WIDTH, draw
from regard.errors import NotLinear, RegardError, ShapeMismatch

EXACT = 1e-12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def largest(x):
    return float(x.abs().max())


@pytest.mark.parametrize("length", [1, 9, 33])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_mixers_own_formula(name, length):
    drawn = draw(name, length, generator(length))
    assert error_of(drawn) < EXACT
    mapped = torch.einsum("ijab,jb->ia", drawn.system.phi(), drawn.u)
    assert largest(mapped - drawn.expected) < EXACT
    assert largest(drawn.expected) > 0.01


@pytest.mark.parametrize("length", [9, 33])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, length):
    assert error_of(with_fault(fault, length, generator())) > 1e-3
    assert error_of(draw(FAULTS[fault][0], length, generator())) < EXACT


@pytest.mark.parametrize("name", ROWS)
def test_the_map_is_causal_and_its_blocks_are_impulse_responses(name):
    drawn = draw(name, 9, generator())
    phi = drawn.system.phi()
    assert phi.shape == (9, 9, WIDTH, WIDTH)
    assert not phi[torch.ones(9, 9).triu(1).bool()].any()
    for j in (0, 4, 8):
        impulse = torch.zeros(9, WIDTH, dtype=torch.float64)
        impulse[j, 1] = 1
        assert largest(drawn.system.simulate(impulse) - phi[:, j, :, 1]) < EXACT


def test_a_batch_is_its_items():
    q, k, u = normal(2, 3, 9, 4), normal(2, 3, 9, 4, seed=1), normal(2, 3, 9, 5, seed=2)
    beta, delta = normal(2, 3, 9).sigmoid(), normal(2, 3, 9).exp()
    decay = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    for both, of_item in (
        (rows.delta_rule(q, k, beta, 5), lambda i: rows.delta_rule(q[i], k[i], beta[i], 5)),
        (rows.lightning_attention(q, k, decay, 5), lambda i: rows.lightning_attention(*both_of(q, k, i), 5)),
        (rows.lightnet(q, k, 5), lambda i: rows.lightnet(q[i], k[i], 5)),
        (ssm.ssd(delta, 0.5, k, q, 5), lambda i: ssm.ssd(delta[i], 0.5, k[i], q[i], 5)),
        (rows.slots(torch.tril(q @ k.mT), 5), lambda i: rows.slots(torch.tril(q[i] @ k[i].mT), 5)),
    ):
        assert both.batch == (2, 3) and both.length == 9
        item = (1, 2)
        assert largest(both.simulate(u)[item] - of_item(item).simulate(u[item])) < EXACT
        assert largest(both.phi()[item] - of_item(item).phi()) < EXACT


def both_of(q, k, item):
    return q[item], k[item], (0.9, 0.5, 0.1)[item[1]]


def test_diagonal_systems_are_stored_as_vectors():
    assert draw("S6", 9, generator()).system.is_diagonal
    full = draw("delta rule", 9, generator()).system
    assert not full.is_diagonal and full.lam.shape == (9, 12, 12)


@pytest.mark.parametrize("name", ["S6", "delta rule", "Titans, one matrix", "LightNet"])
def test_other_states_have_the_same_map(name):
    system = draw(name, 9, generator()).system
    N = system.states
    by_step = torch.eye(N, dtype=torch.float64) + 0.1 * normal(9, N, N)
    scaled = normal(9, N).exp()
    for other in (
        system.transform(by_step),
        system.transform(by_step[0]),
        system.transform(scaled, diagonal=True),
        system.transform(scaled[0], diagonal=True),
    ):
        assert_equivalent(system, other)
        assert largest(other.B - system.B) > 0.01
    assert system.transform(scaled, diagonal=True).is_diagonal == system.is_diagonal


def test_the_two_gauges_of_linear_attention_are_one_transform():
    q, k = F.elu(normal(9, 4)) + 1, F.elu(normal(9, 4, seed=1)) + 1
    read_out, decay = (rows.linear_attention(q, k, 3, gauge=g) for g in ("read-out", "decay"))
    assert_equivalent(read_out, decay)
    eta = (q * k.cumsum(0)).sum(-1)
    moved = decay.transform(eta[:, None].expand(9, 12), diagonal=True)
    assert largest(moved.lam[1:] - 1) < EXACT and largest(moved.B - read_out.B) < EXACT


def test_taylor_attention_comes_near_softmax_as_the_order_grows():
    q, k = 0.6 * normal(12, 3), normal(12, 3, seed=1)
    hidden = torch.ones(12, 12).triu(1).bool()
    exact = (q @ k.T / 3**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    errors, widths = [], []
    for order in (2, 4, 8):
        system = rows.taylor_attention(q, k, 1, order=order)
        widths.append(system.states)
        errors.append(largest(system.phi()[..., 0, 0] - exact))
    assert widths == [13, 121, 9841]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[2] < 1e-3


def test_an_ssd_model_equals_a_normalised_attention_whose_normaliser_grows():
    q, k = normal(9, 4), normal(9, 4, seed=1)
    eta = normal(9).exp().cumsum(0)
    delta, a, b, c = ssm.ssd_of_normalized(q, k, eta)
    normalised = rows.normalized_attention(q, k, eta, 3)
    assert_equivalent(normalised, ssm.ssd(delta, a, b, c, 3))
    with pytest.raises(AssertionError, match=r"differ by .* position \d for position \d"):
        assert_equivalent(normalised, ssm.ssd(1.1 * delta, a, b, c, 3))
    with pytest.raises(AssertionError):
        assert_equivalent(normalised, ssm.ssd(delta, a, b * delta[:, None], c, 3))
    with pytest.raises(RegardError, match="eta must grow"):
        ssm.ssd_of_normalized(q, k, normal(9).exp())


def test_effective_attention_says_whether_it_is_exact():
    q, k = normal(2, 9, 4), normal(2, 9, 4, seed=1)
    weights = torch.tril(q @ k.mT)
    found = effective_attention(rows.slots(weights, 3))
    assert found.exact and largest(found.weights - weights) < EXACT
    assert found.weights.min() < 0
    s6 = draw("S6", 9, generator()).system
    found = effective_attention(s6)
    assert not found.exact
    assert largest(found.weights - torch.linalg.svdvals(s6.phi())[..., 0]) < EXACT
    narrow = LTV(torch.ones(4, 2), torch.ones(4, 2, 3), torch.ones(4, 1, 2))
    assert not effective_attention(narrow).exact


def test_decay_is_found_where_it_is_and_not_where_it_is_not():
    ones = torch.ones(2, 12, 4, dtype=torch.float64)
    decay = torch.tensor([0.5, 1.0], dtype=torch.float64)
    found = decay_profile(rows.lightning_attention(ones, ones, decay, 3))
    assert largest(found.by_lag[0] - 4 * 0.5 ** torch.arange(12, dtype=torch.float64)) < EXACT
    assert largest(found.by_lag[1] - 4) < EXACT
    assert found.half_life.tolist() == pytest.approx([1.0, torch.inf])
    full = rows.delta_rule(ones[0], ones[0] / 2, 0.5 * ones[0, :, 0], 3)
    assert decay_profile(full).kept.tolist() == pytest.approx([0.5**0.25] * 12)


def test_a_map_that_would_be_too_large_is_refused():
    ones = torch.ones(1, 1).expand(3000, 2)
    system = LTV(ones, torch.ones(1, 1, 1).expand(3000, 2, 4), torch.ones(1, 1, 1).expand(3000, 4, 2))
    with pytest.raises(RegardError, match=re.escape("phi() would be [3000, 3000, 4, 4], 1.4e+08 entries")):
        system.phi()
    with pytest.raises(RegardError, match="slot form"):
        rows.slots(torch.ones(1, 1).expand(2000, 2000).tril(), 64)
    with pytest.raises(RegardError, match="Taylor"):
        rows.taylor_attention(torch.ones(9, 64), torch.ones(9, 64), 4, order=5)


GOOD = {"lam": torch.ones(9, 6), "B": torch.ones(9, 6, 2), "C": torch.ones(9, 3, 6), "D": torch.ones(9, 3, 2)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lam": torch.ones(9, 5)}, "lam must be"),
        ({"lam": torch.ones(9, 6, 5)}, r"lam must be \[9, 6, 6\]"),
        ({"C": torch.ones(9, 3, 5)}, r"C must be \[9, 3, 6\]"),
        ({"D": torch.ones(9, 2, 3)}, r"D must be \[9, 3, 2\]"),
        ({"B": torch.ones(6, 2)}, "B must be"),
        ({"B": torch.full((9, 6, 2), torch.nan)}, "B holds a number that is not finite"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(change, told):
    with pytest.raises(RegardError, match=told):
        LTV(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: LTV(**GOOD).simulate(torch.ones(9, 3)), r"u must be \[9, 2\]"),
        (lambda: LTV(**GOOD).transform(torch.ones(5, 5)), "T must be"),
        (lambda: LTV(**GOOD).transform(torch.ones(6, 6)), "no inverse"),
        (lambda: LTV(**GOOD).transform(torch.zeros(6), diagonal=True), "zero on its diagonal"),
        (lambda: rows.slots(torch.ones(3, 3), 2), "not causal"),
        (lambda: rows.slots(torch.ones(3, 4), 2), "weights must be"),
        (lambda: rows.linear_attention(torch.ones(9, 4), torch.ones(8, 4), 3), "q and k must both"),
        (lambda: rows.normalized_attention(*torch.ones(2, 9, 4), torch.zeros(9), 3), "above 0"),
        (lambda: rows.normalized_attention(*torch.ones(2, 9, 4), torch.ones(8), 3), r"eta must be \[9\]"),
        (lambda: rows.normalized_attention(*torch.ones(2, 9, 4), torch.ones(9), 3, gauge="x"), "gauge is"),
        (lambda: rows.taylor_attention(*torch.ones(2, 9, 4), 3, order=-1), "order is -1"),
        (lambda: ssm.s6(*(torch.ones(9, 4),) * 4), "a must be"),
        (lambda: ssm.ssd(torch.ones(9), 1.0, *torch.ones(2, 9, 4), 3, torch.ones(4)), "skip must be"),
        (lambda: ssm.titans(*torch.ones(2, 9, 4), *torch.ones(3, 9), 3, chunk=4), "chunk is 4"),
        (lambda: draw("S7", 9, generator()), "no row 'S7'; the rows are"),
        (lambda: assert_equivalent(LTV(**GOOD), draw("S6", 9, generator()).system), "cannot be compared"),
    ],
)
def test_wrong_input_is_refused(wrong, told):
    with pytest.raises(RegardError, match=told):
        wrong()


def test_a_deep_memory_is_not_linear():
    with pytest.raises(NotLinear, match="memory has 2 layers"):
        ssm.titans(*torch.ones(2, 9, 4), *torch.ones(3, 9), 3, depth=2)
    assert issubclass(ShapeMismatch, RegardError) and issubclass(NotLinear, RegardError)
