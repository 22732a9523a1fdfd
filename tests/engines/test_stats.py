"""Each statistic against its plain definition."""

import pytest
import torch

from regard.engines import stats
from regard.engines.rows import RowBlock


@pytest.fixture
def weights():
    scores = torch.randn(2, 3, 5, 7)
    scores[:, :, 2, 3:] = torch.finfo(torch.float32).min
    return torch.softmax(scores, -1)


@pytest.fixture
def scores():
    return 4 * torch.randn(2, 3, 5, 7)


def test_column_sum(weights):
    torch.testing.assert_close(stats.column_sum(weights), weights.sum(2))
    valid = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    expected = torch.stack([weights[b][:, valid[b]].sum(1) for b in range(2)])
    torch.testing.assert_close(stats.column_sum(weights, valid), expected)


def test_row_sum(weights):
    torch.testing.assert_close(stats.row_sum(0.5 * weights), torch.full((2, 3, 5), 0.5))


def test_entropy_takes_zero_weights(weights):
    expected = torch.zeros(2, 3, 5)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        b, h, r, k = index
        if weights[b, h, r, k] > 0:
            expected[b, h, r] -= weights[b, h, r, k] * weights[b, h, r, k].log()
    torch.testing.assert_close(stats.entropy(weights), expected)


def test_logsumexp_from_a_known_softmax(scores):
    lse = stats.logsumexp(scores, torch.softmax(scores, -1))
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("long", [0, 400])
def test_softmax_entropy_is_the_entropy(scores, sink, long, monkeypatch):
    monkeypatch.setattr(stats, "LONG", long)
    scores[:, :, 1, 2:] = torch.finfo(torch.float32).min
    column = torch.zeros(2, 3, 5, 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :7] if sink else scores.softmax(-1)
    lse = stats.logsumexp(scores, weights)
    found = stats.softmax_entropy(scores, weights, lse, rows_sum_to_one=not sink)
    torch.testing.assert_close(found, stats.entropy(weights), rtol=1e-5, atol=1e-5)


def test_softmax_entropy_has_a_gradient(scores):
    scores.requires_grad_()
    weights = scores.softmax(-1)
    lse = torch.logsumexp(scores, -1)
    (fast,) = torch.autograd.grad(
        stats.softmax_entropy(scores, weights, lse).sum(), scores, retain_graph=True
    )
    (plain,) = torch.autograd.grad(stats.entropy(weights).sum(), scores)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_span_mass(weights):
    span = torch.tensor([[True, False, True, False, False, False, True], [False] * 7])
    expected = torch.stack([weights[b][..., span[b]].sum(-1) for b in range(2)])
    torch.testing.assert_close(stats.span_mass(weights, span), expected)
    torch.testing.assert_close(stats.span_mass(weights, span[:1])[1], weights[1][..., span[0]].sum(-1))


def test_top_keys(weights):
    values, index = stats.top_keys(weights, 3)
    ranked = weights.sort(-1, descending=True)
    torch.testing.assert_close(values, ranked.values[..., :3])
    torch.testing.assert_close(weights.gather(-1, index), values)
    assert stats.top_keys(weights, 99)[0].shape[-1] == 7


@pytest.mark.parametrize("offset", range(-8, 9))
def test_diagonal(weights, offset):
    band, first = stats.diagonal(weights, offset)
    pairs = [(r, r + offset) for r in range(5) if 0 <= r + offset < 7]
    assert band.shape == (2, 3, len(pairs))
    for i, (r, k) in enumerate(pairs):
        assert first + i == r
        torch.testing.assert_close(band[..., i], weights[:, :, r, k])


def test_pair_and_masked_mass(weights):
    chosen = torch.rand(2, 5, 7) < 0.3
    chosen[1] = False
    expected = (weights * chosen[:, None]).sum((2, 3))
    pairs = [mask.flatten().nonzero()[:, 0].int() for mask in chosen]
    torch.testing.assert_close(stats.pair_mass(weights, pairs), expected)
    torch.testing.assert_close(stats.masked_mass(weights, chosen), expected)
    one = (weights * chosen[:1, None]).sum((2, 3))
    torch.testing.assert_close(stats.masked_mass(weights, chosen[:1]), one)


def test_a_block_keeps_its_statistics_until_its_weights_change(scores):
    block = RowBlock(0, 5, 0, 7)
    block.scores = scores
    block.set_softmax(scores.softmax(-1))
    assert block.entropy is block.entropy and block.column_sum is block.column_sum
    torch.testing.assert_close(block.entropy, stats.entropy(block.weights), rtol=1e-5, atol=1e-5)
    block.weights = 0.5 * block.weights
    torch.testing.assert_close(block.row_sum, torch.full((2, 3, 5), 0.5))
    torch.testing.assert_close(block.entropy, stats.entropy(block.weights))
    torch.testing.assert_close(block.column_sum, block.weights.sum(2))
