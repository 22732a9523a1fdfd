"""The study of agreeing explanations, small, and what its best pairs are."""

import pytest

from regard.studies import run
from regard.studies.explanation_agreement import best_pair
from regard.studies.explanation_agreement_parts import kind_of, known_case


def test_known_cases_come_out_as_known():
    found = known_case(0, texts=2, samples=200, steps=40)
    assert found["linear"]["same"] == pytest.approx(1) and found["xor"]["same"] < 1


def test_pairs_are_sorted_out():
    assert kind_of("ig|lime") == "attributions" and kind_of("average|lime") == "mixed"
    assert (
        kind_of("average|flow") == "attention" and kind_of("ig|random") == kind_of("ig|lime again") == "other"
    )
    runs = [
        {"pairs": {"kendall": {"ig|average": a, "ig|flow": b, "ig|lime": 0.9}}}
        for a, b in ((0.1, 0.3), (0.2, 0.1))
    ]
    assert best_pair(runs, "mixed") == "ig|flow"


@pytest.mark.real
def test_the_quick_study_runs():
    outcome = run("explanation-agreement", quick=True)
    assert outcome.quick and 0 <= outcome.value("bilstm_reviews_accuracy") <= 1
