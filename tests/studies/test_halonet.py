"""The study of halo attention: a quick run, its parts, and what would make its claims fail."""

import random

import pytest
import torch

from regard.attention.halo import halo_attention
from regard.studies import find_study, run
from regard.studies import halonet as parts
from regard.studies.halonet_parts import FAULTS, by_pixels, drawn, error_of, marks, moved, ways
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge

SLUG = "halonet"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_finds_the_formula_exact_and_every_fault(outcome):
    assert outcome.quick
    assert max(outcome.measures["error"]["values"]) < 1e-11
    assert outcome.details["faults"].keys() == set(FAULTS)
    assert min(outcome.details["faults"].values()) > 0.01
    assert max(outcome.measures["moved_block"]["values"]) < 1e-6 < 0.1 < outcome.value("moved_pixel")
    assert all(0 <= outcome.value(f"images_{name}") <= 1 for name in parts.NETWORKS)
    counts = outcome.details["parameters"].values()
    assert max(counts) < 1.05 * min(counts) * 1.02


def test_its_picture_is_drawn(outcome, tmp_path):
    kind = find_study(SLUG)
    path = save_picture(kind(kind.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000


@pytest.mark.parametrize("stride", [1, 2])
def test_the_rule_knows_each_fault(stride):
    case = drawn(random.Random(stride), stride)
    torch.manual_seed(0)
    assert error_of(case) < 1e-11
    for fault in FAULTS:
        seen = error_of(case, fault)
        assert seen < 1e-11 if (fault, stride) == ("reduced", 1) else seen > 0.01


def test_the_rule_is_that_of_the_definition():
    case = drawn(random.Random(0), 2)
    q = torch.randn(1, case.sides[0] // 2, case.sides[1] // 2, 2, 6, dtype=torch.float64)
    k, v = torch.randn(2, 1, *case.sides, 2, 6, dtype=torch.float64)
    rel = torch.randn(2, 11, 6, dtype=torch.float64)
    found = halo_attention(q, k, v, case.blocks, case.halos, rel, stride=2, impl="dense")
    torch.testing.assert_close(by_pixels(q, k, v, tuple(rel), case), found)


def test_marks_ask_for_the_pixel_two_to_the_right():
    images, labels, where = marks(3, torch.Generator().manual_seed(0))
    assert images.shape == (3, 2, 16, 16) and not where[:, :, 14:].any()
    assert torch.equal(labels[:, :, :14], images[:, 0, :, 2:]) and torch.equal(where, images[:, 1] > 0)


def test_the_three_ways_compute_the_same():
    torch.manual_seed(0)
    with one_thread():
        found = {name: way() for name, way in ways(16).items()}
    dense = found["dense"].transpose(1, 2).reshape(found["halo"].shape)
    torch.testing.assert_close(found["unfolded"], found["halo"], rtol=0, atol=1e-5)
    torch.testing.assert_close(dense, found["halo"], rtol=0, atol=1e-5)
    assert moved(4) < 1e-5 < 0.1 < moved(1)


GOOD = {
    "error": [1e-14] * 4, "fault": [1.0, 1.1, 1.2, 1.1], "moved_block": [1e-7] * 4, "moved_pixel": [0.8] * 4,
    **{f"inside_{name}": [0.99, 1.0, 0.995] for name in ("halo", "blocks", "window")},
    "inside_unplaced": [0.5, 0.51, 0.49], "across_halo": [0.99, 1.0, 0.995],
    **{f"across_{name}": [0.5, 0.51, 0.49] for name in ("blocks", "window", "unplaced")},
    "images_halo": [0.8, 0.81, 0.8], "images_convolution": [0.7, 0.71, 0.7],
    "images_blocks": [0.75, 0.76, 0.75], "images_alone": [0.3, 0.31, 0.3],
    "growth": [1.0, 1.01, 0.99], "growth_dense": [1.9, 2.0, 1.95],
    "time": [10.0, 10.1, 9.9], "time_unfolded": [30.0, 31.0, 30.0],
}  # fmt: skip


def verdict_of(claim, values):
    kind = find_study(SLUG)
    quantities = {told.name: told for told in kind.quantities}
    told = judge(kind.claims, quantities, {**GOOD, **values})[1]
    return {one["name"]: one["verdict"] for one in told}[claim]


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("formula", {"error": [1e-3] * 4}),
        ("formula", {"fault": [1e-9] * 4}),
        ("across blocks", {"across_halo": [0.7, 0.71, 0.7]}),
        ("across blocks", {"across_window": [0.9, 0.91, 0.9]}),
        ("positions", {"across_unplaced": [0.99, 1.0, 0.99]}),
        ("linear cost", {"growth": [1.6, 1.61, 1.6]}),
        ("faster than unfolding", {"time_unfolded": [11.0, 11.1, 11.0]}),
        ("equal parameters", {"images_convolution": [0.9, 0.91, 0.9]}),
        ("halo on images", {"images_blocks": [0.85, 0.86, 0.85]}),
        ("shifts", {"moved_pixel": [1e-7] * 4}),
    ],
)
def test_each_claim_can_fail(claim, values):
    assert verdict_of(claim, {}) == "holds"
    assert verdict_of(claim, values) == "does not hold here"


def test_without_its_needs_a_claim_cannot_be_told():
    untold = verdict_of("across blocks", {"inside_window": [0.5, 0.51, 0.49]})
    assert untold == "cannot be told at this size"
