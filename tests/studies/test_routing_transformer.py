"""The study of routing: a quick run, what its parts measure, and what would make its claims fail."""

import pytest
import torch

from regard.studies import find_study, run
from regard.studies.picture import save_picture
from regard.studies.routing_transformer_parts import (
    heads,
    language_model,
    leak,
    planted,
    recall_batch,
    recall_model,
)
from regard.studies.verdict import judge

SLUG = "routing-transformer"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_tells_what_needs_no_training(outcome):
    told = {claim["name"]: claim["verdict"] for claim in outcome.claims}
    assert outcome.quick and [told[name] for name in ("exact", "order", "planted")] == ["holds"] * 3
    assert told["recall"] == told["text"] == "cannot be told at this size"
    assert outcome.value("mass_learned") > outcome.value("mass_fixed") > outcome.value("mass_random")


def test_values_turned_around_turn_the_verdicts_around(outcome):
    study = find_study(SLUG)
    values = {name: told["values"] for name, told in outcome.measures.items()}
    values["mass_learned"], values["mass_fixed"] = values["mass_fixed"], values["mass_learned"]
    values["exact"], values["leak_causal"] = values["inexact"], values["leak_topw"]
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, values)
    told = {claim["name"]: claim["verdict"] for claim in claims}
    assert {told[name] for name in ("exact", "order", "planted")} == {"does not hold here"}


def test_the_untrained_parts_measure_every_quantity_of_their_own():
    torch.manual_seed(0)
    named = {q.name for q in find_study(SLUG).quantities if q.over == "draws"}
    assert set(planted()) | set(leak()) == named


def test_every_question_has_one_token_of_its_key_and_the_answer_is_its_value():
    keys, values, answers = recall_batch(5, 20, torch.Generator().manual_seed(0))
    for row in range(5):
        shown = dict(zip(keys[row, :20].tolist(), values[row, :20].tolist(), strict=True))
        assert len(shown) == 20 and (values[row, 20:] == 16).all()
        assert [shown[key] for key in keys[row, 20:].tolist()] == answers[row].tolist()


def test_a_window_sees_the_last_tokens_and_dense_attention_all():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 60, 64)
    order = torch.ones(60, 60).tril().bool()
    assert torch.equal(heads("dense").looked_at(x, x)(0, 60)[0, 0], order)
    assert torch.equal(heads("window").looked_at(x, x)(0, 60)[0, 0], order & ~order.tril(-24))


def test_clusters_by_chance_are_other_ones_in_every_forward_and_of_the_same_size():
    attention = heads("random")
    x = torch.randn(1, 1, 200, 64)
    before = attention(x, x, x)
    assert not torch.allclose(attention(x, x, x), before)
    assert attention.clusters.affinity(x).shape == (1, 1, 16, 200)
    torch.manual_seed(0)
    keys, values, _ = recall_batch(2, 20, torch.Generator().manual_seed(0))
    assert recall_model("routing")(keys, values).shape == (2, 40, 16)


def test_language_models_differ_by_their_attention_alone():
    sizes = {name: sum(p.numel() for p in language_model(name).parameters()) for name in ("local", "full")}
    assert sizes["local"] == sizes["full"]
    chance = language_model("random").model.layers[0].mixer.attention.mechanism
    assert chance.clusters.decay == 1 and chance.routed == 2
    assert language_model("local").model.layers[0].mixer.attention.mechanism.routed == 0


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
