"""The study of multiple choice: a quick run, and that training teaches what the claims need."""

import pytest
import torch

from regard.studies import chinchilla_circuits_parts as parts
from regard.studies import find_study, run
from regard.studies.picture import save_picture

SLUG = "chinchilla-circuits"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


@pytest.mark.real
def test_a_quick_run_has_every_measure(outcome):
    assert outcome.quick and outcome.value("error") < 1e-3 < outcome.value("averaged")
    assert outcome.value("real_error") < 1e-3
    assert len(outcome.details["runs"]) == 1 and len(outcome.details["runs"][0]["drawn"]) == 2


@pytest.mark.real
def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000


def test_parts_add_up_to_what_is_scored():
    model = parts.trained(0, 30, 32, lambda share: None)
    asked = parts.TASK.batch(64, "ordered", torch.Generator().manual_seed(1))
    assert float(parts.apart(model, asked).total.mean()) == pytest.approx(
        parts.scored(model, asked)[1], abs=1e-3
    )
    heads = [("text.1", head) for head in range(4)]
    basis = parts.fit(model, asked, heads)
    full = parts.scored(model, asked)
    assert parts.scored(model, asked, basis, 16) == pytest.approx(full, abs=1e-3)
    assert parts.scored(model, asked, basis, 0) != pytest.approx(full, abs=1e-6)
    assert parts.aligned(basis, basis)[0] == pytest.approx(1.0)


def test_training_lowers_the_loss():
    asked = parts.TASK.batch(64, "ordered", torch.Generator().manual_seed(1))
    losses = []
    for steps in (1, 60):
        model = parts.trained(0, steps, 32, lambda share: None)
        with torch.no_grad():
            logits = model(asked.ids).logits[:, -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, asked.answers)))
    assert losses[1] < losses[0] - 1
