"""The study of Flowformer runs, counts steps as it says, and its rules can come out either way."""

import json

import pytest
import torch

from regard.studies import find_study, read_outcome, run
from regard.studies.base import by_name
from regard.studies.flowformer import NEEDLE, RECALL, exactness, first_below, pieces, specs
from regard.studies.picture import save_picture
from regard.studies.verdict import judge
from regard.tasks.markers import Markers

SLUG = "flowformer"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flowformer")
    run(SLUG, out=folder, quick=True)
    return read_outcome(folder / f"{SLUG}.quick.json")


def told(values):
    """The verdicts of the claims on some values."""
    study = find_study(SLUG)
    filled = {name: [1.0, 1.0, 1.0] for name in by_name(study.quantities)}
    _, claims, _ = judge(study.claims, by_name(study.quantities), {**filled, **values})
    return {claim["name"]: claim["verdict"] for claim in claims}


def test_a_quick_run_measures_everything(outcome):
    assert outcome.quick and set(outcome.measures) == set(by_name(find_study(SLUG).quantities))
    assert set(outcome.details["curves"]) == set(NEEDLE)
    assert len(outcome.measures["recall_flow"]["values"]) == 1 and len(RECALL) == 3
    json.dumps(outcome.details)


def test_rules_can_come_out_either_way():
    sooner = {"flow": [200, 220, 210], "linear": [300, 310, 330], "no_competition": [400, 410, 390]}
    later = {"flow": [300, 320, 330], "linear": [200, 210, 190], "no_competition": [400, 410, 390]}
    assert told(sooner)["needle"] == "holds" and told(later)["needle"] == "does not hold here"
    never = {**sooner, "flow": [600, 600, 600]}
    assert told(never)["needle"] != "holds"
    leaking = {"leak": [0.1, 0.11, 0.12], "leak_full": [0.1, 0.11, 0.12]}
    assert told(leaking)["exact"] == "does not hold here"


def test_exactness_is_exact_and_its_controls_are_not():
    torch.manual_seed(0)
    found = exactness()
    assert found["error"] < 1e-12 < found["unlike"] and found["leak"] == 0 < found["leak_full"]
    assert found["unconserved"] < 1e-4 < 0.1 < found["raw"]


def test_steps_are_counted_by_the_mean_of_twenty():
    losses = [2.0] * 30 + [0.0] * 30
    assert first_below(losses, 0.5) == 46 and first_below([2.0] * 40, 0.5) == 40
    assert pieces(losses) == [2.0, 1.0, 0.0] and pieces([2.0, 1.0]) == [1.5]


def test_the_needle_is_the_only_marker_and_its_colour_the_label():
    task = Markers(length=64)
    tokens, labels = task.batch(200, torch.Generator().manual_seed(0))
    markers = tokens < task.colours
    assert (markers.sum(1) == 1).all() and torch.equal(tokens[markers], labels)
    decoys = ((tokens >= task.colours) & (tokens < 2 * task.colours)).float().mean()
    assert 0.09 < decoys < 0.15 and labels.unique().numel() == task.colours


def test_training_finds_the_needle():
    study = find_study(SLUG)
    made = study(study.quick.__class__(steps=150, length=8), 0)
    with torch.random.fork_rng():
        found = made.needle("flow", 0)
    assert found["needed"] < 150 and found["losses"][0] > 1.5
    assert specs()["clamped"].clamp == 1.0 and not specs()["no_competition"].competition


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
