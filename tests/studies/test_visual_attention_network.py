"""The study of large-kernel attention: a quick run, its parts, and what would make its claims fail."""

import pytest
import torch

from regard.studies import find_study, run
from regard.studies import visual_attention_network_parts as parts
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge

SLUG = "visual-attention-network"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_measures_the_rules(outcome):
    verdicts = {claim["name"]: claim["verdict"] for claim in outcome.claims}
    assert outcome.quick and verdicts["decomposition"] == verdicts["reach"] == "holds"
    assert set(outcome.measures["reach"]["values"]) == {23}
    assert max(outcome.measures["moved_sum"]["values"]) < 1e-12 < min(outcome.measures["moved"]["values"])
    assert 0 < outcome.value("spread") < 0.02


def test_pairs_lie_as_their_label_says_and_far_from_the_edge():
    images, labels = parts.pairs(200, 14, torch.Generator().manual_seed(0))
    assert images.sum((1, 2, 3)).unique().tolist() == [2.0]
    for image, label in zip(images[:, 0], labels, strict=True):
        (top, left), (bottom, right) = image.nonzero().tolist()
        assert (bottom - top, right - left) == ((0, 14) if label == 0 else (14, 0))
        assert min(top, left) >= 12 and max(bottom, right) < 28
    assert 50 < labels.sum() < 150


def test_arms_differ_in_the_gate_alone():
    x = torch.randn(1, 4, 12, 12)
    layer = parts.gate("sum", 4)
    torch.testing.assert_close(layer(x) - x, layer.layer.attention(x))
    assert torch.equal(parts.gate("none", 4)(x), x)
    blind = parts.gate("blind", 4)
    moved = x.clone()
    moved[:, :, 5, 5] += 1
    differs = (blind(moved) != blind(x)).any(1)[0]
    assert differs.sum() == 1
    assert [parts.reached(kind) for kind in ("near", "plain", "sum")] == [5, 9, 23]


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("decomposition", {"inside": [1e-3] * 3}),
        ("decomposition", {"border": [1e-15] * 3}),
        ("reach", {"reach": [21.0] * 3}),
        ("reach", {"reach": [25.0] * 3}),
        ("linear cost", {"growth": [1.5, 1.52, 1.51]}),
        ("linear cost", {"growth_dense": [1.1, 1.12, 1.11]}),
        ("adaptive", {"moved_sum": [0.1, 0.12, 0.11]}),
        ("adaptive", {"moved": [0.0] * 3}),
        ("distance", {"near_14": [0.99, 0.98, 0.99]}),
        ("distance", {"product_14": [0.5, 0.51, 0.49]}),
        ("textures, by reach", {"textures_plain": [0.95, 0.96, 0.95]}),
        ("textures, by space", {"textures_blind": [0.95, 0.96, 0.95]}),
        ("product", {"textures_sum": [0.95, 0.96, 0.95]}),
    ],
)
def test_every_claim_can_fail(claim, values):
    good = {
        "inside": [1e-15] * 3, "border": [0.3, 0.31, 0.3], "reach": [23.0] * 3, "reach_near": [5.0] * 3,
        "growth": [1.0, 1.01, 1.0], "growth_dense": [2.0, 2.01, 2.0], "moved": [0.3, 0.31, 0.3],
        "moved_sum": [0.0] * 3, "product_14": [1.0, 0.99, 1.0], "near_14": [0.5, 0.51, 0.5],
        "sum_14": [1.0] * 3, "product_4": [1.0] * 3, "near_4": [1.0, 0.99, 1.0], "none_4": [0.5] * 3,
        "textures_product": [0.9, 0.91, 0.9], "textures_sum": [0.8, 0.81, 0.8],
        "textures_plain": [0.8, 0.81, 0.8], "textures_blind": [0.5, 0.51, 0.5], "spread": [0.01] * 3,
    }  # fmt: skip
    study = find_study(SLUG)
    quantities = {q.name: q for q in study.quantities}
    before = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, good)[1]}
    after = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, {**good, **values})[1]}
    assert before[claim] == "holds" and after[claim] == "does not hold here"


def test_exponents_are_those_of_the_times():
    times = {f"gated {n}": [n**2.0, 3 * n**2.0] for n in (8, 16, 32)}
    times |= {f"dense {n}": [n**4.0, n**4.0] for n in (8, 16, 32)}
    assert parts.exponents(times, "gated") == pytest.approx([1, 1], abs=1e-4)
    assert parts.exponents(times, "dense") == pytest.approx([2, 2], abs=1e-4)


def test_training_learns_pairs_that_are_near():
    with torch.random.fork_rng(), one_thread():
        assert parts.apart("near", 2, 0, 120, lambda share: None) > 0.8


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
