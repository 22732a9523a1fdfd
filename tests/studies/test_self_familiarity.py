"""The study of self-familiarity: its names, what a seed measures, and what would make its claims fail."""

import types

import pytest

from regard.lens.familiarity.threshold import everyday_concepts
from regard.studies import find_study
from regard.studies import self_familiarity_parts as parts
from regard.studies.base import by_name
from regard.studies.outcome import read_outcome
from regard.studies.picture import save_picture
from regard.studies.self_familiarity_names import PAIRS, SINGLES
from regard.studies.verdict import judge
from regard.tasks.concepts import rarity
from tests.tasks.test_needles import tokenizer  # noqa: F401

SLUG = "self-familiarity"


def test_no_name_is_in_two_seeds_or_among_the_everyday_ones(tokenizer):  # noqa: F811
    size = types.SimpleNamespace(pairs=2, singles=2)
    seeds = [parts.names(tokenizer, size, 0, seed) for seed in range(10)]
    famous = [row["name"] for rows in seeds for row in rows if row["famous"]]
    assert len(famous) == len(set(famous)) == 60
    assert not {name.lower() for name in famous} & {name.lower() for name in everyday_concepts()}
    every = {name for pair in PAIRS for name in pair} | set(SINGLES)
    assert not every & {row["name"] for rows in seeds for row in rows if not row["famous"]}


def test_exchanged_words_have_the_frequency_and_letters_of_the_famous_ones(tokenizer):  # noqa: F811
    rows = parts.names(tokenizer, types.SimpleNamespace(pairs=3, singles=1), 0, 1)
    crossed = [row for row in rows if row["kind"] == "crossed"]
    sides = [[row["name"] for row in crossed if row["famous"] is real] for real in (True, False)]
    assert sorted(" ".join(sides[0]).split()) == sorted(" ".join(sides[1]).split())
    assert sum(map(rarity, sides[0])) == pytest.approx(sum(map(rarity, sides[1])))


def row(name, famous, kind="crossed", **values):
    zero = dict.fromkeys(set(parts.SIGNS.values()), 0.0)
    return {"name": name, "famous": famous, "kind": kind, **zero, **values}


def test_a_seed_is_summed_up_by_hand():
    rows = [
        row("a b", True, score=0.4, swapped=0.1, unmasked=0.8, tokens=-2),
        row("a d", False, score=0.2, swapped=0.1, unmasked=0.7, tokens=-2),
        row("c d", True, score=0.3),
        row("c b", False, score=0.35),
        row("x", True, kind="nonce", score=0.5),
        row("y", False, kind="nonce", score=0.01),
    ]
    found = parts.summed({"names": rows}, 0.25)
    assert found["auc"] == pytest.approx(8 / 9) and found["auc_crossed"] == 0.75 and found["auc_nonce"] == 1
    assert found["auc_name"] == found["auc_crossed_frequency"] == 0.5
    assert (found["score"], found["swapped"], found["unmasked"]) == (0.4, 0.1, 0.8)
    assert (found["score_invented"], found["unmasked_invented"]) == (0.2, 0.7)
    assert found["withheld"] == pytest.approx(2 / 3) and found["withheld_famous"] == 0
    assert found["accuracy"] == pytest.approx(5 / 6) and found["accuracy_always"] == 0.5
    assert found["rank_frequency"] == 0


@pytest.fixture(scope="module")
def committed():
    return read_outcome(f"docs/results/{SLUG}.json")


def told(kind, values):
    return {
        claim["name"]: claim["verdict"] for claim in judge(kind.claims, by_name(kind.quantities), values)[1]
    }


def test_rules_can_come_out_either_way(committed):
    kind = find_study(SLUG)
    values = {name: list(found["values"]) for name, found in committed.measures.items()}
    count = len(values["auc"])
    good = {
        "auc": 0.9, "auc_crossed": 0.8, "auc_crossed_frequency": 0.5, "swapped": 0.05, "score": 0.4,
        "score_invented": 0.1, "unmasked": 0.8, "unmasked_invented": 0.8, "accuracy": 0.8,
        "accuracy_always": 0.5, "withheld": 0.7, "withheld_famous": 0.1, "auc_name": 0.5, "auc_forward": 0.5,
        "auc_backward": 0.5, "auc_yes": 0.5, "auc_agreement": 0.5, "auc_tokens": 0.5,
    }  # fmt: skip
    good = {**values, **{name: [value] * count for name, value in good.items()}}
    assert set(told(kind, good).values()) == {"holds"}
    bad = {
        "tells": {"auc": [0.4] * count}, "name": {"auc_name": [0.95] * count},
        "words": {"auc_crossed": [0.5] * count}, "explanation": {"swapped": [0.4] * count},
        "masking": {"unmasked_invented": [0.3] * count}, "others": {"auc_backward": [0.95] * count},
        "gate": {"withheld_famous": [0.8] * count},
    }  # fmt: skip
    for name, change in bad.items():
        assert told(kind, {**good, **change})[name] == "does not hold here", name


def test_the_picture_is_drawn_from_the_outcome(committed, tmp_path):
    kind = find_study(SLUG)
    path = save_picture(kind(kind.full, 0), committed, tmp_path)
    assert path is not None and path.stat().st_size > 20_000


@pytest.mark.real
def test_one_seed_of_the_real_model_measures_everything(tmp_path):
    kind = find_study(SLUG)
    study = kind(kind.quick, 0)
    study.prepare()
    scores = {"value": 0.1, "low": 0.05, "high": 0.15, "scores": {"Evolution": 0.2}}
    results = {"threshold": scores, "seed 0": study.one(0)}
    assert set(study.measure(results)) == {quantity.name for quantity in kind.quantities}
    rows = results["seed 0"]["names"]
    assert len(rows) == 6 and all(0 < row["score"] <= 1 for row in rows)
    assert all(row["name"].lower() in row["answer"].lower() for row in rows)
    assert len(study.details(results)["remarks"]) == 4
