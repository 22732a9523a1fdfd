"""The study of scan and snap: a quick run, and what would make its claims fail."""

import pytest

from regard.studies import find_study, run
from regard.studies.picture import save_picture
from regard.studies.verdict import judge

SLUG = "scan-and-snap"
HELD = {
    "common": [0.39, 0.39, 0.4], "common_frozen": [0.645, 0.645, 0.645], "common_nothing": [0.6, 0.6, 0.61],
    "tau": [1.0, 1.0, 0.99], "tau_adam": [1.0, 1.0, 0.9],
    "early": [0.19, 0.2, 0.19], "late": [0.01, 0.01, 0.02],
    "moved": [2.0, 2.0, 2.1], "moved_nothing": [0.01, 0.01, 0.02], "winner": [0.3, 0.3, 0.31],
    "winner_start": [0.18, 0.18, 0.18], "entropy_1": [2.6, 2.6, 2.61], "entropy_2": [2.61, 2.61, 2.62],
    "entropy_5": [2.75, 2.75, 2.76], "entropy_10": [2.82, 2.82, 2.83], "entropy_z0.5": [2.8, 2.8, 2.81],
    "entropy_z3": [2.5, 2.5, 2.51], "identity": [1e-4, 1.1e-4, 1e-4], "identity_equal": [0.1, 0.11, 0.1],
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome():
    return run(SLUG, quick=True)


def judged(**changed):
    """Verdicts by claim, of values by which all hold, with some changed."""
    study = find_study(SLUG)
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, HELD | changed)
    return {claim["name"]: claim["verdict"] for claim in claims}


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"common": [0.6, 0.6, 0.61]}, "scan"),
        ({"tau": [0.5, 0.5, 0.51]}, "scan"),
        ({"late": [0.3, 0.3, 0.31]}, "snap"),
        ({"moved_nothing": [2.0, 2.0, 2.1]}, "nothing"),
        ({"entropy_10": [2.6, 2.6, 2.61]}, "ratio"),
        ({"entropy_z3": [2.9, 2.9, 2.91]}, "rate"),
        ({"winner": [0.9, 0.9, 0.91]}, "several"),
        ({"identity": [0.1, 0.11, 0.1]}, "identity"),
    ],
)
def test_a_claim_fails_where_it_is_not_so(changed, claim):
    assert set(judged().values()) == {"holds"}
    assert judged(**changed)[claim] == "does not hold here"


def test_a_quick_run_measures_everything(outcome):
    assert outcome.quick
    assert outcome.value("common_frozen") == pytest.approx(10 / 15.5)
    assert outcome.value("common") < outcome.value("common_frozen")


def test_the_picture_is_drawn(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path is not None and path.stat().st_size > 10_000
