"""The study of mixture of heads runs, asks what it says, and its rules can come out either way."""

import json

import pytest
import torch

from regard.attention.moh import MoHAttention
from regard.runtime.anatomy import anatomy_of
from regard.studies import find_study, read_outcome, run
from regard.studies import mixture_of_heads_language as language
from regard.studies.base import by_name
from regard.studies.mixture_of_heads import MixtureOfHeadsStudy, Size, exactness, returned
from regard.studies.mixture_of_heads_language import attention_alone, evenness, losses, prune, route
from regard.studies.mixture_of_heads_parts import (
    ChanceRouter,
    Looker,
    accuracy,
    choices,
    convert,
    dense,
    routed,
    train_looker,
)
from regard.studies.picture import have_matplotlib
from regard.studies.verdict import judge
from regard.tasks.look_back import LookBackText
from tests.support.families import FAMILIES

SLUG = "mixture-of-heads"


@pytest.fixture(scope="module")
def outcome_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    run(SLUG, out=folder, quick=True)
    return folder


@pytest.fixture(scope="module")
def outcome(outcome_folder):
    return read_outcome(outcome_folder / f"{SLUG}.quick.json")


def told(values):
    """The verdicts of the claims on some values."""
    study = find_study(SLUG)
    filled = {name: [1.0, 1.0, 1.0] for name in by_name(study.quantities)}
    _, claims, _ = judge(study.claims, by_name(study.quantities), {**filled, **values})
    return {claim["name"]: claim["verdict"] for claim in claims}


def text(rows=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    symbols, tasks = (torch.randint(n, (rows, 32), generator=draw) for n in (16, 8))
    return LookBackText(symbols, tasks, symbols)


def test_a_quick_run_measures_everything(outcome, outcome_folder):
    assert outcome.quick and set(outcome.measures) == set(by_name(find_study(SLUG).quantities))
    json.dumps(outcome.details)
    assert not have_matplotlib() or (outcome_folder / f"{SLUG}.quick.png").stat().st_size > 10_000


def test_rules_can_come_out_either_way():
    good = {"all_on": [0.99, 0.98, 0.99], "moh": [0.98, 0.99, 0.97], "dense8": [0.8, 0.82, 0.81]}
    assert told(good)["gain"] == "holds"
    assert told({**good, "dense8": good["moh"], "moh": good["dense8"]})["gain"] == "does not hold here"
    assert told({**good, "all_on": [0.1, 0.1, 0.1]})["gain"] == "cannot be told at this size"
    before = {"came_query_norm": [4.6, 4.7, 4.5], "came_random": [4.0, 4.1, 3.9]}
    assert told(before)["score"] == "does not hold here"
    assert told({"came_query_norm": before["came_random"], "came_random": before["came_query_norm"]})[
        "score"
    ] == ("holds")
    tuned = {"tuned_query_norm": [3.0, 3.1, 3.0], "tuned_random": [3.3, 3.4, 3.2]}
    assert told({**tuned, "tuned_magnitude": [3.5, 3.6, 3.4]})["worth"] == "holds"
    assert told({**tuned, "tuned_magnitude": [2.5, 2.6, 2.4]})["worth"] == "does not hold here"


def test_what_came_back_is_a_share_of_what_routing_cost():
    assert returned(5.0, 3.5, 3.0, 2.5) == 0.5
    assert returned(5.0, 5.0, 3.0, 3.0) == 0.0 and returned(5.0, 90.0, 3.0, 3.0) == -2.0
    assert returned(3.0, 2.0, 3.0, 2.5) == 0.0  # nothing was lost


def test_exactness_is_exact_and_its_control_is_not():
    torch.manual_seed(0)
    found = exactness()
    assert found["error"] < 1e-12 < 0.1 < found["unlike"]


def test_information_is_that_of_heads_that_follow_the_task():
    class Told(torch.nn.Module):
        """Two routed heads, the first on for even tasks."""

        shared = 1

        def __init__(self, gates):
            super().__init__()
            self.gates = gates

        def forward(self, x):
            return self.gates

    given = text(64)
    even = given.tasks % 2 == 0
    gates = torch.stack([torch.ones(even.shape), even.float(), 1 - even.float()], -1)
    model = Looker(dense())
    model.attention.router = Told(gates)
    found = choices(model, given)
    assert found["information"] == pytest.approx(0.693, abs=0.01) and found["entropy"] > 0.99
    model.attention.router = Told(torch.tensor([1.0, 1.0, 0.0]).expand(*even.shape, 3))
    assert choices(model, given) == {"information": pytest.approx(0, abs=1e-9), "entropy": 0.0}


def test_a_looker_is_converted_to_what_it_was_and_trains():
    torch.manual_seed(0)
    model, given = Looker(dense()), text()
    whole = convert(model, "query_norm", 4, 4)
    torch.testing.assert_close(whole(given), model(given))
    train_looker(whole, 2, torch.Generator().manual_seed(0), lambda done: None)
    assert not torch.equal(whole(given), model(given)) and isinstance(whole.attention, MoHAttention)
    right = model(given).argmax(-1)
    known = given._replace(answers=right.masked_fill(torch.arange(32) < 8, -100))
    assert accuracy(model, known) == 1.0 and accuracy(model, known._replace(answers=right + 1)) == 0.0


def test_heads_by_chance_differ_from_call_to_call_and_are_as_many():
    layer = routed(1, 3, chance=True)
    assert isinstance(layer.router, ChanceRouter)
    x = torch.randn(2, 9, 128)
    one, two = layer.router(x), layer.router(x)
    assert not torch.equal(one, two) and ((one > 0).sum(-1) == 4).all()


def test_each_arm_is_the_dense_stage_and_then_as_many_steps_as_the_size_says(monkeypatch):
    trained = []
    real = language.further
    monkeypatch.setattr(language, "further", lambda *a: trained.append((a[2], a[4])) or real(*a))
    study = MixtureOfHeadsStudy(MixtureOfHeadsStudy.quick, 0)
    ways = [study.tuned(way) for way in ("dense", "query_norm", "query_norm_loose", "magnitude")]
    assert trained == [(1, 0), *[(3, 1)] * 4]  # the dense stage is shared
    assert "even" not in ways[0] and len(ways[1]["even"]) == study.size.windows
    assert ways[0]["before"] != ways[1]["before"] == ways[2]["before"] != ways[1]["after"]


def test_pruned_heads_are_those_of_the_smallest_weights():
    model = FAMILIES["llama"].build()
    ids = torch.randint(5, 90, (2, 9))
    for site in anatomy_of(model).sites:
        weight = site.module.o_proj.weight
        width = weight.shape[1] // 4
        with torch.no_grad():
            weight[:, 2 * width : 3 * width] *= 1e-4
    whole = model(ids).logits
    prune(model, 1)
    torch.testing.assert_close(model(ids).logits, whole, rtol=1e-2, atol=1e-3)
    prune(model, 2)
    assert (model(ids).logits - whole).abs().max() > 0.1


def test_routing_leaves_attention_to_be_trained_and_all_heads_are_the_model():
    model = attention_alone(FAMILIES["llama"].build())
    moved = [name for name, p in model.named_parameters() if p.requires_grad]
    assert moved and all(".self_attn." in name for name in moved)
    rows = torch.randint(5, 90, (2, 9))
    before = losses(model, rows)
    assert losses(route(model, "full"), rows) == pytest.approx(before, abs=1e-5)
    few = route(FAMILIES["llama"].build(), "query_norm")
    assert losses(few, rows) != pytest.approx(before, abs=1e-3)
    assert all(0 <= value <= 1 for value in evenness(few, rows))
    assert Size().windows >= 3
