"""Choosing few of many: ties, validity, controls, and what a choice keeps."""

import pytest
import torch

from regard.attention.select import (
    coverage,
    kept_mass,
    nearest_scores,
    oracle_scores,
    random_scores,
    recall,
    routing_scores,
    top_k,
    top_mask,
)
from regard.errors import RegardError, ShapeMismatch


def by_hand(scores, k, valid):
    """Indices of the k best of one row, by Python's sort."""
    order = sorted((i for i in range(len(scores)) if valid[i]), key=lambda i: (-scores[i], i))
    return order[:k]


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("k", [0, 1, 3, 7, 50])
def test_the_best_are_chosen_and_ties_go_to_the_lowest_index(n, k):
    generator = torch.Generator().manual_seed(n * 100 + k)
    scores = torch.randint(0, 4, (6, 3, n), generator=generator).float()
    valid = torch.rand(6, 3, n, generator=generator) < 0.7
    ascending, ranked = top_k(scores, k, valid), top_k(scores, k, valid, by_score=True)
    mask = top_mask(scores, k, valid)
    assert ascending.shape == ranked.shape == (6, 3, k)
    for i in range(6):
        for j in range(3):
            best = by_hand(scores[i, j].tolist(), k, valid[i, j].tolist())
            missing = [-1] * (k - len(best))
            assert ranked[i, j].tolist() == best + missing
            assert ascending[i, j].tolist() == sorted(best) + missing
            assert mask[i, j].nonzero().flatten().tolist() == sorted(best)


def test_each_row_may_have_its_own_count():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0]).expand(5, 4)
    found = top_mask(scores, torch.tensor([0, 1, 2, 3, 9]))
    assert found.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]]


def test_infinite_scores_and_nan_are_kept_apart():
    scores = torch.tensor([torch.nan, -torch.inf, 1.0, torch.inf])
    assert top_k(scores, 4).tolist() == [2, 3, -1, -1]
    assert top_k(scores, 1).tolist() == [3]


def test_scores_are_float32_and_detached_for_grouped_heads():
    q = torch.randn(2, 4, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(2, 2, 6, 5, dtype=torch.bfloat16)
    found = routing_scores(q, k, 0.5)
    assert found.dtype == torch.float32 and not found.requires_grad
    expected = 0.5 * q.detach().float() @ k.float().repeat_interleave(2, 1).transpose(2, 3)
    torch.testing.assert_close(found, expected)
    assert routing_scores(q.double(), k.double()).dtype == torch.float64
    assert not top_mask(torch.ones(3, requires_grad=True), 1).requires_grad


def test_the_oracle_keeps_most_and_the_nearest_are_near():
    generator = torch.Generator().manual_seed(0)
    weights = (3 * torch.randn(2, 3, 400, 40, generator=generator)).softmax(-1)
    kept = {
        "oracle": kept_mass(weights, top_mask(oracle_scores(weights), 5)),
        "random": kept_mass(weights, top_mask(random_scores(weights.shape, generator), 5)),
    }
    assert (kept["oracle"] >= kept["random"]).all()
    assert abs(float(kept["random"].mean()) - 5 / 40) < 0.03
    best = weights.topk(5, -1).values.sum(-1)
    torch.testing.assert_close(kept["oracle"], best)
    near = top_k(nearest_scores(torch.tensor([0, 5, 9]), torch.arange(10)), 3)
    assert near.tolist() == [[0, 1, 2], [4, 5, 6], [7, 8, 9]]


def test_the_oracle_of_blocks_adds_up_their_keys():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.35]])
    torch.testing.assert_close(oracle_scores(weights, 2), torch.tensor([[0.3, 0.35, 0.35]]))


def test_random_choices_are_equally_likely_and_follow_their_generator():
    shape = (4000, 6)
    one, same, other = (random_scores(shape, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    often = top_mask(one, 2).float().mean(0)
    assert (often - 2 / 6).abs().max() < 0.03


def test_recall_counts_the_best_that_were_chosen():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    chosen = torch.tensor([[True, False, True, True], [False, False, False, True]])
    torch.testing.assert_close(recall(scores, chosen, 2), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(recall(scores, chosen, 3), torch.tensor([2 / 3, 1 / 3]))
    valid = torch.tensor([[True, False, False, False], [False, False, False, False]])
    assert recall(scores, chosen, 2, valid).tolist() == [1.0, 1.0]


def test_coverage_counts_candidates_that_some_row_chose():
    chosen = torch.tensor([[True, False, False], [True, True, False]])
    assert coverage(chosen).item() == pytest.approx(2 / 3)
    valid = torch.tensor([True, True, False])
    assert coverage(chosen, valid).item() == 1.0


def test_mass_is_a_share_of_what_there_is():
    weights = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.0]])
    chosen = torch.tensor([True, False, True])
    torch.testing.assert_close(kept_mass(weights, chosen), torch.tensor([2 / 3, 1.0]))


def test_wrong_input_is_refused():
    with pytest.raises(RegardError, match="-1 were to be chosen"):
        top_k(torch.ones(3), -1)
    with pytest.raises(ShapeMismatch, match=r"scores are int64 \[3\]"):
        top_mask(torch.ones(3).long(), 1)
