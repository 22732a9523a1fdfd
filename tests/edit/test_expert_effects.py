"""Rates, random sets that fire as much, and effects, on the model that comes with the package."""

import pytest
import torch

import regard
from regard.edit import TuneExperts
from regard.edit.experts import record_experts
from regard.edit.experts.controls import firing_rates, matched_sets
from regard.edit.experts.difference import differential
from regard.edit.experts.drawing import plot_experts
from regard.edit.experts.effects import (
    Rate,
    effects_table,
    measure_effects,
    profile_prompts,
    shows,
    text_loss,
)
from regard.errors import RegardError
from regard.tasks.closed_places import ClosedPlaces


@pytest.fixture(scope="module")
def loaded():
    return regard.load("closed-places")


def test_wilsons_interval():
    rate = Rate.of([True] * 3 + [False] * 7)
    z, n, p = 1.959964, 10, 0.3
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    for found, sign in ((rate.low, -1), (rate.high, 1)):
        assert found == pytest.approx((middle + sign * half) / (1 + z * z / n), abs=1e-4)
    assert str(Rate.of([True] * 4)) == "100% (51%-100%)"
    with pytest.raises(RegardError, match="no answers to count"):
        Rate.of([])


def test_random_sets_fire_as_much():
    rates = {(layer, e): 0.01 * (e + 1) for layer in range(4) for e in range(32)}
    like = [(0, 30), (1, 30), (2, 25)]
    found = matched_sets(rates, like, 12, seed=3)
    assert len(set(found.sets)) == 12 and found == matched_sets(rates, like, 12, seed=3)
    goal = sum(rates[e] for e in like)
    for some, share in zip(found.sets, found.rates, strict=True):
        assert len(some) == 3 and not set(some) & set(like)
        assert sum(rates[e] for e in some) == pytest.approx(share * goal) and abs(share - 1) <= 0.1
    assert found.sets != matched_sets(rates, like, 12, seed=4).sets


def test_where_none_fires_as_much_the_nearest_are_taken():
    rates = {(0, e): 0.1 + 0.001 * e for e in range(10)} | {(0, 10): 1.0}
    found = matched_sets(rates, [(0, 10)], 4)
    assert all(0.1 <= share <= 0.11 for share in found.rates) and len(found.sets) == 4
    with pytest.raises(RegardError, match="11 are needed|there are 10"):
        matched_sets(rates, [(0, 10)], 11)
    with pytest.raises(RegardError, match="1 other experts are left"):
        matched_sets({(0, 0): 1.0, (0, 1): 1.0, (0, 2): 1.0}, [(0, 0), (0, 1)], 1)


def test_profiles_of_texts_are_those_of_their_tokens(loaded):
    model, tokenizer = loaded
    prompts = [
        "what happened at dawn in alden ?",
        "repeat fair flood :",
        "tell me what happened in brock long ago :",
    ]
    use, layers = profile_prompts(model, tokenizer, prompts, batch=2)
    for row, prompt in zip(use, prompts, strict=True):
        alone, _ = record_experts(model, dict(tokenizer(prompt, return_tensors="pt")))
        torch.testing.assert_close(row, alone[0], atol=1e-4, rtol=1e-3)
    assert layers == [0, 1, 2, 3] and use.shape == (3, 4, 32)
    assert len(firing_rates(use, layers)) == 128
    last, _ = profile_prompts(model, tokenizer, prompts, last=True, value="count")
    assert set(last.unique().tolist()) == {0.0, 1.0} and float(last[0].sum()) == 16


def test_effects(loaded, tmp_path):
    model, tokenizer = loaded
    world = ClosedPlaces()
    closed = [one.prompt for one in world.refused(held_out=True)[::15]]
    open_ = [one.prompt for one in world.answered()[::120]]
    everything = TuneExperts(off=[(layer, e) for layer in range(4) for e in range(32)], mode="silence")
    stated = world.statements()[:4]
    with pytest.warns(UserWarning, match="had no routed expert left"):
        plain, without = measure_effects(
            model,
            tokenizer,
            closed,
            open_,
            {"as it is": None, "nothing": everything},
            tokens=8,
            neutral=stated,
        )
    assert (plain.behaviour.share, plain.others.share) == (1.0, 0.0)
    assert all("cannot" in answer for answer in plain.answers[0])
    assert without.loss > plain.loss and plain.loss == pytest.approx(
        text_loss(model, tokenizer, stated, batch=3)
    )
    table = effects_table([plain, without])
    assert table["experts"] == ["as it is", "nothing"] and table["behaviour share"][0] == 1.0
    use, layers = profile_prompts(model, tokenizer, [*closed, *open_])
    scores = differential(use, layers, ["b"] * len(closed) + ["o"] * len(open_), "b")
    plot_experts(scores, [(0, 1)], [plain, without]).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_rules():
    assert shows()("I'm sorry, I can't.") and not shows()("there was a fair .")
    assert shows("fair|flood")("A Flood.")
    with pytest.raises(RegardError, match="no regular expression"):
        shows("(")
