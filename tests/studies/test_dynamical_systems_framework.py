"""The study of dynamical systems: a quick run, its parts, and what would make its claims fail."""

import pytest
import torch

from regard.attention.dsf import faults
from regard.studies import find_study, run
from regard.studies.dynamical_systems_framework import MIXERS, best, mixer, one_thread
from regard.studies.picture import save_picture
from regard.studies.verdict import judge

SLUG = "dynamical-systems-framework"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def verdicts(outcome):
    return {claim["name"]: claim["verdict"] for claim in outcome.claims}


def test_a_quick_run_finds_the_rows_exact_and_every_fault(outcome):
    assert outcome.quick and verdicts(outcome)["oracle"] == verdicts(outcome)["equal"] == "holds"
    assert max(outcome.measures["error"]["values"]) < 1e-12
    assert min(outcome.measures["fault"]["values"]) > 1e-3
    assert len(outcome.details["rows"]) == 15 and len(outcome.details["faults"]) == 6
    assert all(0 <= outcome.value(name) <= 1 for name in MIXERS)


def test_an_oracle_that_sees_no_fault_fails(outcome, monkeypatch):
    study = find_study(SLUG)
    made = study(study.quick, 0)
    blind = {name: (row, lambda drawn: drawn) for name, (row, _) in faults.FAULTS.items()}
    monkeypatch.setattr(faults, "FAULTS", blind)
    values = {name: told["values"] for name, told in outcome.measures.items()}
    values["fault"] = [min(made.systems()["faults"].values()) for _ in range(3)]
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, values)
    assert next(c for c in claims if c["name"] == "oracle")["verdict"] == "does not hold here"


def test_the_mixers_differ_in_what_they_mix_alone():
    x = torch.randn(2, 9, 32)
    sizes = {name: sum(p.numel() for p in mixer(name).parameters()) for name in MIXERS}
    assert sizes["softmax"] == sizes["linear_16"] == sizes["blind"] > sizes["linear_8"] > sizes["linear_4"]
    for name in MIXERS:
        layer = mixer(name)
        changed = torch.cat([x[:, :1] + 1, x[:, 1:]], 1)
        moved = (layer(changed) - layer(x)).abs().amax((0, 2))
        assert moved[0] > 1e-4 and (moved[5] > 1e-6) == (name != "blind")


def test_the_rate_is_chosen_by_sequences_that_do_not_count():
    runs = [{"choose": [0.5, 0.4], "count": [0.1, 0.9]}, {"choose": [0.2, 0.25], "count": [0.1, 0.9]}]
    assert best(runs) == 0


def test_training_learns_to_recall():
    study = find_study(SLUG)
    made = study(study.quick.__class__(steps=150, pairs=2, length=8, symbols=9), 0)
    with torch.random.fork_rng(), one_thread():
        found = {name: made._train(name, 1e-2, 0, 0.0)["count"] for name in ("softmax", "blind")}
    assert found["softmax"] > 0.9 > 0.6 > found["blind"]


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
