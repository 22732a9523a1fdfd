"""The study of sparse codes: a quick run on a small model, what is kept, and how it is held."""

import numpy as np
import pytest

from regard.studies import find_study, run
from regard.studies import sae_circuits_parts as parts
from regard.studies.picture import save_picture

SLUG = "sae-circuits"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


@pytest.mark.real
def test_a_quick_run_has_every_measure(outcome):
    assert outcome.quick and all(len(told["values"]) == 1 for told in outcome.measures.values())
    assert outcome.value("signs_sae") > 0.9 > 0.65 > outcome.value("signs_diff")
    assert set(outcome.details) == {"ioi", "greater_than", "docstring"}
    assert 0 < len(outcome.details["ioi"]["circuit"]) <= 3


@pytest.mark.real
def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000


def test_what_is_kept_is_what_was_scored():
    results, circuit = parts.planted("means", 40, 0)
    kept = parts.scored(results, 0, parts.PLANTED)
    table = parts.table_of(kept)
    found = parts.areas(kept, [list(head) for head in circuit])
    assert len(table) == 40 and found["sae"] > 0.9 > found["shuffled"]
    inside = np.array([name in circuit for name in table.names])
    sums = (table["sae"][inside][:, None] > table["sae"][~inside]).mean()
    ties = (table["sae"][inside][:, None] == table["sae"][~inside]).mean()
    assert found["sae"] == pytest.approx(sums + ties / 2)


def test_planted_signs_have_no_mean():
    results, circuit = parts.planted("signs", 3000, 1)
    means = results.vectors[results.positive].mean(0).norm(dim=-1) / results.vectors.norm(dim=-1).mean(0)
    assert means.max() < 0.06 and len(circuit) == 8
