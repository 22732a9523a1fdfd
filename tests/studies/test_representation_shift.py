"""The study of representation shift: what it measures of a random model, and that its rules can fail."""

from dataclasses import replace

import pytest

from regard.studies import find_study
from regard.studies import representation_shift_parts as parts
from regard.studies.base import by_name
from regard.studies.verdict import judge

SLUG = "representation-shift"


@pytest.fixture(scope="module")
def results():
    """A quick run on a random model."""
    kind = find_study(SLUG)
    study = kind(replace(kind.quick, layers=(8, 18, 22, 26), kinds=("scene", "drawn", "none")), 0)
    study.prepare()
    return study, {step.name: step.work() for step in study.steps()}


def test_a_quick_run_measures_everything_that_the_claims_name(results):
    study, found = results
    kind = find_study(SLUG)
    measured = study.measure(found)
    named = {name for claim in kind.claims for r in (*claim.rules, *claim.needs)
             for name in (r.measure, r.control) if name}  # fmt: skip
    assert named <= set(measured) and all(len(values) == 1 for values in measured.values())


def test_steering_the_last_token_alone_equals_a_whole_forward_with_it_alone(results):
    import torch

    import regard
    from regard.edit.shift import AddVector

    study, _ = results
    reviews = parts.Reviews(study.model, study.tokenizer, 2, 0)
    edit = AddVector(vector=torch.randn(32), layer=20, scope="last")
    ids = reviews.ids["asked_negative"]
    for edits, whole in ((edit,), False), ((replace(edit, scope="all"),), True):
        with torch.no_grad(), regard.steer(study.model, *edits):
            logits = study.model(ids).logits[:, -1]
        read = reviews.score_whole if whole else reviews.score
        found = read("asked_negative", *edits)
        torch.testing.assert_close(
            found, logits[:, reviews.good] - logits[:, reviews.bad], rtol=1e-3, atol=1e-4
        )


def told(values):
    kind = find_study(SLUG)
    return {c["name"]: c["verdict"] for c in judge(kind.claims, by_name(kind.quantities), values)[1]}


def test_rules_can_come_out_either_way():
    kind = find_study(SLUG)
    low = {q.name: [0.1, 0.11, 0.12] for q in kind.quantities}
    good = {
        **low, "own_shifted": [0.99] * 3, "alike_shifted": [0.99] * 3, "alike_common": [0.99] * 3,
        "still_distance": [9.0] * 3, "closed_8": [0.0] * 3, "closed_18": [0.5] * 3, "closed_22": [0.9] * 3,
        "closed_26": [1.0] * 3, "whole_22": [1.5] * 3, "whole_26": [1.5] * 3, "negated_22": [-1.0] * 3,
        "negated_26": [-1.0] * 3, "scene_explained_shifted": [0.9] * 3, "scene_gain": [0.8] * 3,
        "scene_cosine_shifted": [0.9] * 3, "scene_norm": [1.0] * 3, "scene_accuracy": [1.0] * 3,
        "right_concept": [3.0] * 3, "colour_common": [0.9] * 3, "colour_tuned": [0.9] * 3,
        "scene_cosine_29": [0.9] * 3,
    }  # fmt: skip
    assert set(told(good).values()) == {"holds"}
    bad = told({**good, **{name: low[name] for name in ("own_shifted", "closed_26", "scene_explained_shifted",
                "scene_gain", "scene_norm", "right_concept", "colour_common", "scene_cosine_29")},
                "scene_cosine_common": [0.9] * 3, "still_distance": [0.1] * 3, "alike_common": [0.5] * 3,
                "still_shifted": [0.5] * 3, "shuffled_22": [0.8] * 3})  # fmt: skip
    assert "holds" not in bad.values()
    assert told({**good, "scene_accuracy": [0.1] * 3})["concepts"] == "cannot be told at this size"
