"""The study of tunable experts: a quick run, and what would make its claims fail."""

import pytest

from regard.studies import find_study, run
from regard.studies.picture import save_picture
from regard.studies.verdict import judge

SLUG = "tunable-experts"
HELD = {
    "planted_first": [1.0, 1.0, 1.0], "planted_first_shuffled": [0.0, 0.0, 0.0],
    "planted_lifted": [1.0, 1.0, 0.99], "planted_lifted_random": [0.0, 0.0, 0.01],
    "refused": [1.0, 1.0, 0.99], "right": [1.0, 1.0, 0.99], "lifted": [0.5, 0.5, 0.51],
    "lifted_random": [0.1, 0.1, 0.11], "lifted_random_mean": [0.0, 0.0, 0.01],
    "lifted_last": [0.0, 0.0, 0.01],
    "lifted_silence": [0.4, 0.4, 0.41], "lifted_refill": [0.4, 0.4, 0.41], "told": [0.4, 0.4, 0.41],
    "told_random": [0.05, 0.05, 0.06], "lost": [0.01, 0.01, 0.02], "lost_random": [0.02, 0.02, 0.01],
    "forced": [0.2, 0.2, 0.21], "forced_random": [0.05, 0.05, 0.06], "fires": [1.0, 1.0, 0.99],
    "loss": [1.0, 1.0, 1.1], "loss_off": [1.1, 1.1, 1.2], "loss_random": [1.1, 1.1, 1.2],
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
    ("changed", "claim", "verdict"),
    [
        ({"planted_first": [0.0, 0.0, 0.0]}, "planted", "does not hold here"),
        ({"lifted": [0.05, 0.05, 0.06]}, "lift", "does not hold here"),
        ({"lifted_random": [0.6, 0.6, 0.61]}, "lift", "does not hold here"),
        ({"refused": [0.1, 0.1, 0.11]}, "lift", "cannot be told at this size"),
        ({"told": [0.0, 0.0, 0.01]}, "told", "does not hold here"),
        ({"lost": [0.3, 0.3, 0.31]}, "kept", "does not hold here"),
        ({"lifted_silence": [0.0, 0.0, 0.01]}, "removal", "does not hold here"),
        ({"forced": [0.0, 0.0, 0.01]}, "forced", "does not hold here"),
    ],
)
def test_a_claim_fails_where_it_is_not_so(changed, claim, verdict):
    assert set(judged().values()) == {"holds"}
    assert judged(**changed)[claim] == verdict


def test_a_quick_run_measures_everything(outcome):
    assert outcome.quick
    assert (outcome.value("planted_first"), outcome.value("planted_lifted")) == (1.0, 1.0)
    assert outcome.value("refused") == 0.0, "it has hardly learned anything"


def test_the_picture_is_drawn(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path is not None and path.stat().st_size > 10_000
