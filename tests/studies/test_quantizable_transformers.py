"""The study of outliers: a quick run, its parts, and its picture."""

import pytest
import torch

from regard.studies import find_study, run
from regard.studies.picture import save_picture
from regard.studies.quantizable_transformers import HEADS, one_head

SLUG = "quantizable-transformers"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


@pytest.mark.real
def test_a_quick_run_measures_outliers_and_what_bits_cost(outcome):
    assert outcome.quick and outcome.value("kurtosis") > 100 > 3 > 0
    assert outcome.value("loss_w8a8") > outcome.value("loss_inputs") > outcome.value("loss_w16a16")
    assert outcome.value("clip_0") == pytest.approx(outcome.value("loss"), abs=1e-3)
    assert outcome.value("clip_4") > outcome.value("clip_1") > outcome.value("clip_0")
    assert len(outcome.details["curves"]["kurtosis"]) == 30 and set(outcome.details["runs"]) == set(HEADS)


def test_heads_differ_in_what_they_are_named_for():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 49)
    models = {name: one_head(name, 49, 16, 16) for name in HEADS}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes["gated"] == sizes["softmax"] + 50 and len({v for k, v in sizes.items() if k != "gated"}) == 1
    models["clipped_15"].load_state_dict(models["softmax"].state_dict())
    assert not torch.allclose(models["clipped_15"](x), models["softmax"](x), atol=1e-4)
    assert models["softmax"].scores(x).shape == (2, 16, 16)


def test_training_lowers_the_error():
    study = find_study(SLUG)
    errors = [study(study.quick.__class__(steps=steps), 0).head("softmax", 0)["error"] for steps in (1, 250)]
    assert errors[1] < errors[0] / 3


@pytest.mark.real
def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
