"""The study of bi-level routing attention: a quick run, its parts and controls, and claims that can fail."""

import pytest
import torch

from regard.attention.biformer import Regions
from regard.studies import biformer as parts
from regard.studies import find_study, run
from regard.studies.biformer_parts import (
    CONTENTS,
    REGIONS,
    TOPK,
    VALUES,
    Beside,
    Chosen,
    RecallModel,
    classifier,
    fewest_scores,
    others,
    planted,
    recall_batch,
    recalled,
)
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge

SLUG = "biformer"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_finds_planted_directions(outcome):
    verdicts = {claim["name"]: claim["verdict"] for claim in outcome.claims}
    assert outcome.quick and verdicts["finds"] == "holds"
    assert outcome.measures["exponent_dense"]["values"] == [pytest.approx(2)]
    assert 1.2 < outcome.value("exponent") < 1.5
    sizes = outcome.details["parameters"]
    assert len({sizes[arm] for arm in ("routed", "random", "nearest", "full", "none")}) == 1
    assert abs(sizes["convolved"] / sizes["routed"] - 1) < 0.05


def test_planted_mass_is_ordered_and_fades():
    torch.manual_seed(0)
    pure, stray = planted(1.0), planted(0.3)
    for found in (pure, stray):
        assert found["best"] >= found["routed"] > found["nearest"] > found["random"] > 0
        assert abs(found["random"] - TOPK / REGIONS**2) < 0.03
    assert pure["routed"] > 0.9 * pure["best"] and stray["routed"] < 0.9 * stray["best"]


def test_what_is_to_be_recalled_stands_in_the_region_with_the_same_tag():
    batch = recall_batch(3, torch.Generator().manual_seed(0))
    asked = batch["target"] >= 0
    assert asked.sum(1).tolist() == [REGIONS**2 - CONTENTS] * 3
    assert (batch["values"][asked] == VALUES).all() and (batch["values"][~asked] < VALUES).all()
    for item in range(3):
        contents = (~asked[item]).nonzero()[:, 0]
        assert len(batch["tags"][item, contents].unique()) == CONTENTS
        for region in asked[item].nonzero()[:, 0].tolist():
            place = batch["target"][item, region]
            assert not asked[item, place] and batch["tags"][item, place] == batch["tags"][item, region]
            assert torch.equal(batch["answers"][item, region], batch["values"][item, place])


def test_controls_choose_in_their_own_way():
    near = others("nearest", Regions((8, 12), (4, 3)), 2)
    assert near[0, 0, :3].tolist() == [0, 1, 3] and near[1, 4, :5].tolist() == [4, 1, 3, 5, 7]
    torch.manual_seed(0)
    chance = others("random", Regions((8,), (8,)), 500)
    assert (chance.sort(-1).values == torch.arange(8)).all()
    assert (chance[..., 0] == 0).float().mean().sub(1 / 8).abs() < 0.02
    x = torch.randn(1, 8, 8, 8)
    layers = {choice: Chosen(choice, dim=8, heads=2, regions=4, topk=2) for choice in ("routed", "nearest")}
    layers["nearest"].load_state_dict(layers["routed"].state_dict())
    assert layers["nearest"].routing(x).index[0, 0].tolist() == [0, 1]
    assert not torch.equal(layers["nearest"](x), layers["routed"](x))
    moved = x.clone()
    moved[:, 7, 7] += 1
    beside = Beside(dim=8, heads=2, regions=4, topk=2)
    assert torch.equal(beside(moved)[:, :5, :5], beside(x)[:, :5, :5]), "only the convolution is left"
    with torch.no_grad():
        for arm in parts.MODELS:
            model = classifier(arm, 10, 1, embed_dims=[16, 32], head_dim=8).eval()
            assert model(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 10)


def test_a_layer_learns_to_recall():
    study = find_study(SLUG)
    made = study(study.quick.__class__(steps=110, asked=4), 0)
    with torch.random.fork_rng(), one_thread():
        found = made.recall("routed", 0)
    assert found["accuracy"] > 0.5 and found["recall"] > 0.9


def test_a_shared_vector_sends_queries_to_queries():
    torch.manual_seed(0)
    batch = recall_batch(4, torch.Generator().manual_seed(1))
    apart = recalled(RecallModel("routed", shared=False), batch)["recall"]
    shared = RecallModel("routed", shared=True)
    assert apart > 0.8 and recalled(shared, batch)["recall"] < 0.1
    asked = batch["target"] >= 0
    chosen = asked[torch.arange(4)[:, None, None], shared.routing(batch).index]
    assert chosen[asked].float().mean() > 0.9


def test_scores_are_those_of_both_levels():
    best, count = fewest_scores(24)
    assert count == best**4 + TOPK * best**2 * (24 // best) ** 4
    assert all(count <= n**4 + TOPK * n**2 * (24 // n) ** 4 for n in (2, 3, 4, 6, 8, 12, 24))
    assert parts.slope([1, 10, 100], [2, 20, 200]) == pytest.approx(1)


GOOD = {
    **{f"{name}_{way}": [value] * 3
       for name, most in (("pure", 0.75), ("mixed", 0.35), ("stray", 0.2))
       for way, value in (("best", most), ("routed", 0.8 * most if name == "stray" else 0.98 * most),
                          ("random", 0.08), ("nearest", 0.1))},
    **{f"recall_{arm}": [0.99] * 3 for arm in ("routed", "full", "shared_full")},
    **{f"recall_{arm}": [0.13] * 3 for arm in ("random", "nearest", "shared_routed")},
    "found_routed": [1.0] * 3, "found_random": [0.1] * 3, "found_nearest": [0.1] * 3,
    "found_shared_routed": [0.0] * 3, "exponent": [1.33], "exponent_off": [0.01], "exponent_dense": [2.0],
    **{f"{name}_{arm}": [value] * 3 for name in parts.SETS
       for arm, value in (("routed", 0.95), ("random", 0.9), ("nearest", 0.91), ("full", 0.95), ("none", 0.8),
                          ("convolved", 0.85))},
}  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("finds", {"pure_routed": [0.6] * 3}),
        ("finds", {"pure_nearest": [0.7] * 3}),
        ("fades", {"stray_routed": [0.2] * 3}),
        ("learns", {"recall_routed": [0.5] * 3}),
        ("learns", {"recall_nearest": [0.9] * 3}),
        ("shared vector", {"found_shared_routed": [0.5] * 3}),
        ("shared vector", {"recall_shared_routed": [0.99] * 3}),
        ("cost", {"exponent_off": [0.2]}),
        ("cost", {"exponent_dense": [1.5]}),
        ("images, choice", {"textures_random": [0.97] * 3}),
        ("images, full", {"digits_full": [0.99] * 3}),
        ("images, attention", {"digits_convolved": [0.97] * 3}),
    ],
)
def test_every_claim_can_fail(claim, values):
    study = find_study(SLUG)
    quantities = {q.name: q for q in study.quantities}
    before = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, GOOD)[1]}
    after = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, {**GOOD, **values})[1]}
    assert before[claim] == "holds" and after[claim] == "does not hold here"


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
