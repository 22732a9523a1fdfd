"""The study of LightNet: a quick run, its parts, and what would make its claims fail."""

import pytest
import torch

from regard.attention.lightnet import additive
from regard.models.pixels import PixelModel
from regard.studies import find_study, run
from regard.studies.lightnet import DECAYS, POSITIONS, SCANS, decay, errors, mixer, one_thread, reach
from regard.studies.picture import save_picture

SLUG = "lightnet"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_finds_the_forms_exact_and_trains_everything(outcome):
    verdicts = {claim["name"]: claim["verdict"] for claim in outcome.claims}
    assert outcome.quick and verdicts["exact"] == verdicts["saturation"] == "holds"
    assert max(outcome.measures["error"]["values"]) < 1e-11
    assert max(outcome.measures["reach_scan"]["values"]) == 0 < min(outcome.measures["reach"]["values"])
    assert len(outcome.details["decays"]) == 1 and len(outcome.details["decays"][0]) == 63
    assert set(outcome.details["times"]) == {"lightnet", "one scan", "two scans"}


def test_a_wrong_form_would_be_seen(monkeypatch):
    torch.manual_seed(0)
    right = errors(150)
    assert right["error"] < 1e-11 < 1e-3 < right["unguarded"]
    decaying = additive.decaying

    def late(piece, state):
        out, last = decaying(piece, state)
        return out.roll(1, 2), last

    monkeypatch.setattr(additive, "decaying", late)
    assert errors(150)["error"] > 1e-3


def test_reach_is_zero_in_a_causal_scan_alone():
    found = reach()
    assert found["reach_scan"] == 0 < 1e-6 < found["reach"]


def test_random_keys_forget_like_a_mean():
    torch.manual_seed(0)
    kept = decay(torch.randn(64, 1001, 16)).mean((0, 2))
    for t in DECAYS:
        assert abs(float(kept[t - 1]) - t / (t + 1)) < 0.03


def test_the_mixers_differ_in_what_they_mix_alone():
    sizes = {n: sum(p.numel() for p in mixer(n).parameters()) for n in (*SCANS, *POSITIONS)}
    assert len({sizes[n] for n in (*SCANS, "none", "tpe")}) == 1 and sizes["lrpe"] == sizes["both"]
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 64)
    for name in SCANS:
        layer = mixer(name)
        changed = x.clone()
        changed[:, -1, -1] += 1
        moved = (layer(changed) - layer(x)).abs().amax((0, 3)).flatten()
        assert (moved[0] > 1e-7) == (name != "one_scan"), name
    model = PixelModel(16, 8, 64, [mixer("tpe")], tpe=4)
    assert model.smooth is not None and PixelModel(16, 8, 64, [mixer("none")]).smooth is None


def test_training_learns_what_stands_above():
    study = find_study(SLUG)
    made = study(study.full.__class__(steps=120), 0)
    with torch.random.fork_rng(), one_thread():
        assert made.above("both", 0) > 0.5


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
