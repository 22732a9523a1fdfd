"""The study of softplus attention runs, its task can be learnt, and its rules can come out either way."""

import pytest
import torch

from regard.errors import RegardError
from regard.studies import find_study, read_outcome, run
from regard.studies.base import by_name
from regard.studies.picture import save_picture
from regard.studies.softplus_attention import KINDS, specs
from regard.studies.verdict import judge
from regard.tasks.repeated import IGNORE, Repeated

SLUG = "softplus-attention"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("softplus")
    run(SLUG, out=folder, quick=True)
    return read_outcome(folder / f"{SLUG}.quick.json")


def told(**means):
    """The verdicts of the claims on values around some means."""
    study = find_study(SLUG)
    values = {name: [x, 1.01 * x, 0.99 * x] for name, x in means.items()}
    filled = {name: [0.05, 0.051, 0.049] for name in by_name(study.quantities)}
    _, claims, _ = judge(study.claims, by_name(study.quantities), {**filled, **values})
    return {claim["name"]: claim["verdict"] for claim in claims}


def test_a_quick_run_measures_everything(outcome):
    assert outcome.quick and set(outcome.measures) == set(by_name(find_study(SLUG).quantities))
    assert set(outcome.details["curves"]) == set(KINDS)
    plain, swapped = (outcome.measures[name]["values"] for name in ("plain", "swapped"))
    assert swapped[0] > plain[0] + 1


def test_rules_can_come_out_either_way():
    assert told(softmax_512=0.2)["flat"] == "holds"
    assert told(softmax_512=0.2, lssar_15_512=0.2)["flat"] == "does not hold here"
    assert told()["flat"] == "does not hold here"
    assert told()["cause"] == "does not hold here" and told(scaled_softmax_512=0.3)["cause"] == "holds"
    assert told(lssar_15_64=3.4, softmax_512=0.2)["flat"] == "cannot be told at this size"


def test_what_repeats_can_be_known():
    tokens, targets = Repeated().batch(50, 64, torch.Generator().manual_seed(0))
    known = targets != IGNORE
    assert (
        torch.equal(tokens[:, 1:][known[:, :-1]], targets[:, :-1][known[:, :-1]]) and not known[:, -1].any()
    )
    for row, where in zip(tokens, known, strict=True):
        period = int(where.nonzero()[0]) + 1
        assert 8 <= period <= 24 and torch.equal(row[period:], row[:-period])
    with pytest.raises(RegardError, match="above the longest period"):
        Repeated().batch(1, 24, torch.Generator())
    with pytest.raises(RegardError, match="cannot be drawn"):
        Repeated(shortest=9, longest=8)


def test_training_learns_what_repeats_and_what_is_compared_differs_in_attention_alone():
    study = find_study(SLUG)
    made = study(study.quick.__class__(steps=120, sequences=8), 0)
    with torch.random.fork_rng():
        found = made.train("scaled_softmax", 0)
    assert found["64"] < 2.5
    assert specs()["scaled_softmax"].activation == "exp" and specs()["lssar_3"].p_eval == 3.0


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
