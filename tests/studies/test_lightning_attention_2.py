"""The study of the tiled form: a quick run, what it measures, and what would make claims fail."""

import pytest
import torch

from regard.attention import decay_rates
from regard.studies import find_study, run
from regard.studies.lightning_attention_2 import HEADS, apart, distance, drawn, over, with_gradients
from regard.studies.picture import save_picture
from regard.studies.rounds import in_rounds, peak_bytes
from regard.studies.verdict import judge

SLUG = "lightning-attention-2"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def judged(outcome, **changed):
    """Verdicts by claim, with some measures changed."""
    study = find_study(SLUG)
    values = {name: told["values"] for name, told in outcome.measures.items()} | changed
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, values)
    return {claim["name"]: claim["verdict"] for claim in claims}


def test_a_quick_run_finds_one_operator_and_the_fault(outcome):
    assert outcome.quick and judged(outcome)["equal"] == "holds"
    assert max(outcome.measures["apart"]["values"]) < 1e-4
    assert "2 x" not in outcome.details["remarks"][0] and "8,192 numbers" in outcome.details["remarks"][1]


def test_claims_fail_where_cost_would_grow(outcome):
    flat, steep = [1.0, 1.0, 1.1], [4.0, 4.0, 4.1]
    good = {
        "forward": flat, "both": flat, "sdpa": steep, "memory": [1.0], "memory_masked": [4.0],
        "decoded": flat, "decoded_cache": steep, "apart": [0.0, 1e-6, 0.0], "apart_off": [0.01, 0.011, 0.01],
    }  # fmt: skip
    names = ("forward", "memory", "lunch", "decoding")
    assert all(judged(outcome, **good)[name] == "holds" for name in names)
    bad = {"forward": steep, "memory": [8.0], "apart": [0.01, 0.011, 0.01], "decoded": steep}
    assert all(judged(outcome, **(good | bad))[name] == "does not hold here" for name in names)


def test_gradients_are_compared_too():
    torch.manual_seed(0)
    given = drawn(9, width=4, double=True)
    exact = with_gradients(given, decay_rates(HEADS), "naive", 64)
    assert len(exact) == 6 and apart(with_gradients(given, decay_rates(HEADS), "tiles", 4), exact) < 1e-12
    for part in range(6):
        wrong = [x.clone() for x in exact]
        wrong[part] += 0.5
        assert apart(wrong, exact) == pytest.approx(0.5)


def test_curves_and_times_are_compared_place_by_place():
    curves = {"whole": [3.0, 2.0, 1.0], "tiles": [3.0, 2.0, 1.5], "chunks": [3.0, 2.0, 1.0]}
    assert distance(curves, "tiles") == 0.5 and distance(curves, "chunks") == 0
    assert over([8.0, 16.0], [1.0, 1.0], 8) == [1.0, 2.0]


def test_peak_memory_is_counted_in_bytes():
    kept = []
    assert 4e6 <= peak_bytes(lambda: kept.append(torch.ones(1_000_000))) < 4.2e6

    def twice():
        for _ in range(2):
            torch.ones(1_000_000).add_(1)

    assert peak_bytes(twice) < 4.2e6


def test_rounds_take_turns():
    seen = []
    seconds = in_rounds({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b"] * 3 and [len(found) for found in seconds.values()] == [2, 2]


def test_the_picture(outcome, tmp_path):
    study = find_study(SLUG)
    assert save_picture(study(study.quick, 0), outcome, tmp_path).stat().st_size > 10_000
