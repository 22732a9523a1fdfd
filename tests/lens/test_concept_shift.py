"""How concepts move: planted shifts, controls that find nothing, and the formulas of the official code."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from regard.errors import RegardError, ShapeMismatch
from regard.lens.concepts import Concepts, Features, analyse_shift, recovered_words, shift_words
from regard.studies.representation_shift_parts import planted
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def found():
    return planted(0)


def test_a_planted_shift_is_found_on_the_other_half(found):
    own = found["own"]
    assert own["shifted"] > 0.99 and own["unshifted"] < 0.8 and own["common"] < 0.8 and own["other"] < 0.8
    assert own["explained"]["shifted"] > 0.9 > own["explained"]["common"] + 0.3
    assert own["consistency"] > 0.9


def test_one_shift_for_all_is_as_good_where_all_move_alike(found):
    assert found["alike"]["shifted"] == pytest.approx(found["alike"]["common"], abs=0.01)


def test_where_nothing_moves_nothing_is_gained_but_on_the_same_samples_it_looks_so(found):
    still = found["none"]
    assert still["shifted"] == pytest.approx(still["unshifted"], abs=0.01)
    assert still["consistency"] == pytest.approx(still["chance"], abs=0.04)
    assert still["same_distance"] < 1e-3 < 0.1 < still["distance"]
    assert still["explained"]["shifted"] < 0.02


def official(a, b, concepts, tuned):
    """The formulas of xl-vlms, written out: Delta_k, shifted concepts, matching on unshifted ones."""
    mine = concepts.activate(a).argmax(1)
    delta = torch.stack([b[mine == k].mean(0) - a[mine == k].mean(0) for k in range(len(concepts))])
    cosine = lambda x, y: (x @ y.T) / (x.norm(dim=1)[:, None] * y.norm(dim=1)[None])  # noqa: E731
    _, columns = linear_sum_assignment(-cosine(concepts.vectors, tuned.vectors).numpy())
    partner = tuned.vectors[columns]
    shifted = concepts.vectors + delta
    return delta, columns, cosine(partner, shifted).diagonal(), (partner - shifted).norm(dim=1)


def test_agrees_with_the_official_formulas_where_nothing_is_held_out():
    a = torch.randn(60, 8)
    b = a + torch.randn(60, 8)
    concepts, tuned = Concepts(torch.randn(4, 8), "k-means"), Concepts(torch.randn(4, 8), "k-means")
    shift = analyse_shift(a, b, concepts=concepts, tuned=tuned, split=False)
    delta, columns, cosine, distance = official(a, b, concepts, tuned)
    torch.testing.assert_close(shift.vectors, delta, rtol=1e-5, atol=1e-5)
    assert shift.partner.tolist() == columns.tolist()
    torch.testing.assert_close(shift.cosine["shifted"], cosine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shift.distance["shifted"], distance, rtol=1e-5, atol=1e-5)


def test_consistency_is_the_mean_cosine_with_the_mean_and_with_each_other():
    a, b = torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    concepts = Concepts(torch.zeros(1, 2), "k-means")
    shift = analyse_shift(a, b, concepts=concepts, tuned=concepts, split=False)
    assert float(shift.consistency[0]) == pytest.approx((2 * 0.5**0.5 + 1) / 3, abs=1e-5)
    assert float(shift.pairwise[0]) == pytest.approx((0 + 2 * 0.5**0.5) / 3, abs=1e-5)
    median = analyse_shift(a, b, concepts=concepts, tuned=concepts, split=False, average="median")
    assert median.vectors[0].tolist() == [1.0, 1.0]


def test_a_concept_without_samples_has_no_shift_and_breaks_nothing():
    a = torch.randn(20, 3)
    far = torch.cat([torch.zeros(2, 3), torch.full((1, 3), 99.0)])
    concepts = Concepts(far + torch.tensor([[0.0], [0.1], [0.0]]), "k-means")
    shift = analyse_shift(a, a + 1, concepts=concepts, tuned=concepts)
    assert shift.counts[2] == 0 and bool(shift.vectors[2].isnan().all())
    assert all(np.isfinite(list(shift.recovery().values()))) and "-" in str(shift.table)
    assert shift.explained["shifted"] == pytest.approx(1.0, abs=1e-4)


def test_features_are_paired_by_sample():
    states = torch.randn(12, 1, 4)
    one = Features(states[:10], (3,), tuple(range(10)))
    other = Features(states[2:] + 1, (3,), tuple(range(2, 12)))
    shift = analyse_shift(one, other, count=2)
    torch.testing.assert_close(shift.common, torch.ones(4), rtol=1e-4, atol=1e-4)
    assert int(shift.counts.sum()) == 4 and shift.concepts.layer == 3
    apart = Features(states, (3,), tuple(range(50, 62)))
    with pytest.raises(RegardError, match="share no sample: 10 were kept of the one, and 12"):
        analyse_shift(one, apart, count=2)


@pytest.mark.parametrize(
    ("other", "options", "told"),
    [
        (torch.randn(12, 5), {}, "before and"),
        (torch.randn(11, 4), {}, "before and"),
        (torch.randn(12, 4), {"count": 7}, "6 and 6 in either half"),
        (torch.randn(12, 4), {"match": "best"}, "must be one of original, scored"),
        (torch.randn(12, 4), {"average": "mode"}, "average is 'mode'"),
        (torch.randn(12, 4), {"alpha": float("inf")}, "alpha is inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, options, told):
    with pytest.raises(RegardError, match=told):
        analyse_shift(torch.randn(12, 4), other, **{"count": 2, **options})


def test_features_and_a_tensor_are_no_pair():
    with pytest.raises(RegardError, match="two of a kind"):
        analyse_shift(Features(torch.randn(4, 1, 4), (0,), (0, 1, 2, 3)), torch.randn(4, 4), count=2)
    with pytest.raises(ShapeMismatch):
        Features(torch.randn(4, 4), (0,), (0, 1, 2, 3))


def test_words_of_a_shift_are_those_that_it_raises():
    model = FAMILIES["llama"].build()

    class Words:
        def convert_ids_to_tokens(self, ids):
            return [f"Ġword{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in ids]

    before = torch.randn(40, 1, model.lm_head.weight.shape[1])
    after = before + 5 * model.lm_head.weight[42]
    made = [Features(x.detach(), ("final_norm",), tuple(range(40))) for x in (before, after)]
    shift = analyse_shift(*made, count=2)
    assert [words[0] for words in shift_words(model, Words(), shift)] == ["wordec"] * 2
    table = recovered_words(model, Words(), shift, count=5)
    assert np.mean(table["shifted"]) > np.mean(table["unshifted"])
