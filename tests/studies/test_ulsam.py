"""The study of subspace attention: a quick run, its marks and arms, and what would make its claims fail."""

import pytest
import torch

from regard.attention import ULSAM
from regard.studies import find_study, run
from regard.studies import ulsam_parts as parts
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge

SLUG = "ulsam"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_counts_and_compares(outcome):
    verdicts = {claim["name"]: claim["verdict"] for claim in outcome.claims}
    assert outcome.quick and verdicts["fused"] == verdicts["counts"] == "holds"
    assert outcome.value("kept") < 0.8 and 0 < outcome.value("spare") < 0.02
    assert outcome.value("most") >= outcome.value("even") > 0
    sizes = outcome.details["parameters"]
    assert sizes["full"] > sizes["squeeze"] > sizes["ulsam"] > sizes["one_map"] > sizes["identity"]


def test_images_of_two_classes_differ_in_the_mark_alone():
    known = parts.marks()
    assert known.shape == (10, 4, 4) and not known.sum((1, 2)).any()
    assert len({tuple(mark.flatten().tolist()) for mark in known}) == 10
    images, labels = parts.marked(200, torch.Generator().manual_seed(0))
    assert images.shape == (200, 1, 16, 16) and labels.unique().tolist() == list(range(10))
    mean = torch.stack([images[labels == n].mean() for n in range(10)])
    assert mean.std() < 0.02, "brightness tells nothing"
    found = torch.nn.functional.conv2d(images - images.mean(), known[:, None]).amax((2, 3)).argmax(1)
    assert (found == labels).float().mean() > 0.6, "the marks can be told by matching them"


def test_arms_differ_in_two_places_alone():
    kinds = {
        "full": "InvertedResidual", "ulsam": "ULSAM", "one_map": "ULSAM", "identity": "Identity",
        "squeeze": "Squeeze",
    }  # fmt: skip
    plain = parts.network("full")
    for arm in parts.ARMS:
        layers = parts.network(arm).layers
        assert {type(layers[place]).__name__ for place in parts.PLACES} == {kinds[arm]}
        others = [str(layer) for at, layer in enumerate(layers) if at not in parts.PLACES]
        assert others == [str(layer) for at, layer in enumerate(plain.layers) if at not in parts.PLACES]
    assert [parts.network("ulsam").layers[place].groups for place in parts.PLACES] == [4, 4]


def test_maps_are_told_as_they_are():
    model, (images, _) = parts.network("ulsam").eval(), parts.marked(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, ULSAM)):
            layer.conv_point.weight.zero_()
    told = parts.maps_of(model, images)
    assert [one["flat"] for one in told] == [1.0, 1.0]
    assert [one["even"] for one in told] == pytest.approx([1 / 16, 1 / 4])
    assert [one["most"] for one in told] == pytest.approx([1 / 16, 1 / 4])
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, ULSAM)):
            layer.conv_point.weight.normal_()
            layer.bn_point.weight.fill_(1e6)
    assert parts.maps_of(model, images)[0]["most"] > 0.2


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("fused", {"error": [1e-3] * 3}),
        ("fused", {"fault": [1e-15] * 3}),
        ("counts", {"operations_two": [0.05]}),
        ("counts", {"parameters_four": [0.1]}),
        ("better than nothing", {"right_identity": [0.9, 0.91, 0.9]}),
        ("as good as the layers", {"right_full": [0.99, 0.98, 0.99]}),
        ("as good as the layers", {"kept": [0.9] * 3}),
        ("subspaces", {"right_one_map": [0.9, 0.91, 0.9]}),
        ("channel weights", {"right_squeeze": [0.9, 0.91, 0.9]}),
        ("uneven maps", {"most": [0.1, 0.11, 0.1]}),
    ],
)
def test_every_claim_can_fail(claim, values):
    good = {
        "error": [1e-15] * 3, "fault": [0.3, 0.31, 0.3],
        **{f"{kind}_{n}": [v] for kind in ("operations", "parameters")
           for n, v in (("two", 0.127), ("four", 0.25), ("added", 0.0))},
        "right_full": [0.81, 0.82, 0.81], "right_ulsam": [0.81, 0.82, 0.811],
        **{f"right_{arm}": [0.5, 0.52, 0.51] for arm in ("one_map", "identity", "squeeze")},
        "kept": [0.55] * 3, "spare": [0.009] * 3, "most": [0.6, 0.61, 0.6], "even": [0.15] * 3,
        "flat": [0.0] * 3,
    }  # fmt: skip
    study = find_study(SLUG)
    quantities = {q.name: q for q in study.quantities}
    before = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, good)[1]}
    after = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, {**good, **values})[1]}
    assert before[claim] == "holds" and after[claim] == "does not hold here"


def test_training_learns_marks():
    with torch.random.fork_rng(), one_thread():
        assert parts.learned("full", 0, 90, 1000, lambda share: None)["right"] > 0.15


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
