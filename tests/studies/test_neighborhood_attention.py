"""The study of neighbourhood attention: a quick run, its parts, and what would make its claims fail."""

import random

import pytest
import torch

from regard.attention.neighborhood import na2d, neighborhood_index, neighborhood_mask
from regard.studies import find_study, run
from regard.studies import neighborhood_attention as parts
from regard.studies.neighborhood_attention_rule import FAULTS, drawn, keys_of, mask_of
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge

SLUG = "neighborhood-attention"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def verdicts(outcome):
    return {claim["name"]: claim["verdict"] for claim in outcome.claims}


def test_a_quick_run_finds_borders_exact_and_every_fault(outcome):
    assert outcome.quick
    assert verdicts(outcome)["borders"] == "holds"
    assert max(outcome.measures["error"]["values"]) < 1e-12
    assert outcome.details["faults"].keys() == FAULTS.keys()
    assert min(outcome.details["faults"].values()) > 0.01
    assert len(outcome.details["gains"]) == 2 and min(outcome.details["gains"].values()) > 0
    assert all(0 <= outcome.value(f"next_{name}") <= 1 for name in parts.NEXT)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_rule_by_hand_is_that_of_the_masks(axes):
    chance = random.Random(axes)
    for _ in range(10):
        grid = drawn(chance, axes)
        options = [list(column) for column in zip(*(option for _, option in grid), strict=True)]
        assert torch.equal(mask_of(grid), neighborhood_mask([n for n, _ in grid], *options))
    for name, grid in FAULTS.items():
        assert not torch.equal(mask_of(grid, name), mask_of(grid))


def test_the_rule_by_hand():
    assert [keys_of(i, 6, (3, 1, 1, False)) for i in (0, 3, 5)] == [[0, 1, 2], [2, 3, 4], [3, 4, 5]]
    assert keys_of(3, 8, (4, 1, 1, False)) == [1, 2, 3, 4], "even windows have one more key before"
    assert keys_of(6, 7, (3, 1, 2, False)) == [2, 4, 6] and keys_of(5, 7, (3, 1, 2, False)) == [1, 3, 5]
    assert keys_of(3, 9, (4, 4, 1, True)) == [0, 1, 2, 3] and keys_of(4, 9, (4, 4, 1, True)) == [4]


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("borders", {"error": [1e-3] * 3}),
        ("borders", {"fault": [1e-15] * 3}),
        ("shifts", {"moved": [0.5, 0.6, 0.7]}),
        ("shifts", {"moved_blocks": [1e-7] * 3}),
        ("linear cost", {"growth": [1.5, 1.52, 1.51]}),
        ("linear cost", {"growth_dense": [1.1, 1.12, 1.11]}),
        ("linear memory", {"memory": [2.0]}),
        ("linear memory", {"memory_dense": [1.0]}),
        ("tiles", {"gain_2d": [1.1, 1.2, 1.15]}),
        ("tiles", {"gain_1d": [2.5, 2.6, 2.55], "gain_2d": [4.0, 4.1, 4.2]}),
        ("across blocks", {"next_blocks": [1.0] * 3}),
        ("few keys", {"next_whole": [1.0] * 3}),
        ("dilation", {"fifth_plain": [0.9] * 3}),
    ],
)
def test_every_claim_can_fail(claim, values):
    good = {
        "error": [1e-15] * 3, "fault": [1.0, 1.1, 1.2], "moved": [1e-7] * 3, "moved_blocks": [1.0, 1.1, 1.2],
        "growth": [1.0, 1.01, 1.02], "growth_dense": [2.0, 2.01, 2.02], "memory": [1.0],
        "memory_dense": [9.0], "gain_1d": [9.0, 9.1, 9.2], "gain_2d": [3.0, 3.1, 3.2],
        "next_window": [0.99, 0.98, 0.99], "next_blocks": [0.8, 0.81, 0.8], "next_unplaced": [0.3] * 3,
        "next_whole": [0.2, 0.21, 0.2], "fifth_plain": [0.12, 0.13, 0.12], "fifth_dilated": [0.9, 0.91, 0.9],
    }  # fmt: skip
    study = find_study(SLUG)
    quantities = {q.name: q for q in study.quantities}
    before = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, good)[1]}
    after = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, {**good, **values})[1]}
    assert before[claim] == "holds" and after[claim] == "does not hold here"


def test_exponents_and_gains_are_those_of_the_times():
    times = {f"near {n}": [n**2.0, 3 * n**2.0] for n in (8, 16, 32)}
    times |= {f"dense {n}": [n**4.0, n**4.0] for n in (8, 16, 32)}
    assert parts.exponents(times, "near") == pytest.approx([1, 1])
    assert parts.exponents(times, "dense") == pytest.approx([2, 2])
    gains = parts.gained({"1d 9 3 tiles": [1.0, 1.0, 2.0], "1d 9 3 gathered": [4.0, 6.0, 6.0]})
    assert gains == {"1d 9 3": 4.0}


def test_gathered_keys_give_what_tiles_give():
    q, k, v = torch.randn(3, 9, 8, 4, 32)
    found = parts.gathered(*(x.flatten(0, 1) for x in (q, k, v)), neighborhood_index((9, 8), (5, 4)))
    expected = na2d(q[None], k[None], v[None], (5, 4))[0].flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_models_differ_in_their_attention_alone():
    sizes = {}
    for name in parts.MIXERS:
        layers = parts.mixers(name)
        sizes[name] = sum(p.numel() for layer in layers for n, p in layer.named_parameters() if n != "rpb")
        x = torch.randn(1, parts.SIDE, parts.SIDE, parts.DIM)
        assert all(layer(x).shape == x.shape for layer in layers)
    assert len(set(sizes.values())) == 1
    x = torch.randn(1, 12, 12, parts.DIM)
    moved = x.clone()
    moved[:, 3] += 1
    for name, seen in (("window", True), ("blocks", False), ("plain", True)):
        one = parts.mixers(name)[0]
        assert bool((one(moved) - one(x))[:, 4].abs().max() > 1e-6) == seen, name
    second = parts.mixers("dilated")[1]
    assert (second(moved) - second(x))[:, 7].abs().max() > 1e-6


def test_training_learns_the_colour_above():
    study = find_study(SLUG)
    made = study(study.quick.__class__(steps=120), 0)
    with torch.random.fork_rng(), one_thread():
        assert made.train("window", 1, 0) > 0.5


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
