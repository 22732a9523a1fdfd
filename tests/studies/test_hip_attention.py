"""The study of HiP runs, its ways to choose keep one budget, and its rules can come out either way."""

import json

import pytest
import torch

from regard.attention import Context, HiP
from regard.attention.hip import HiPMask
from regard.attention.layout import Layout
from regard.studies import find_study, read_outcome, run
from regard.studies.base import by_name
from regard.studies.hip_attention import KEPT
from regard.studies.hip_attention_parts import answered, attending, spec_of, subject, what_is_kept
from regard.studies.picture import have_matplotlib
from regard.studies.verdict import judge
from regard.tasks.passkey import Passkey, log_probability

SLUG = "hip-attention"
OPTIONS = {"k": 16, "window": 8, "dense_layers": 0}


@pytest.fixture(scope="module")
def outcome_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hip")
    run(SLUG, out=folder, quick=True)
    return folder


@pytest.fixture(scope="module")
def outcome(outcome_folder):
    return read_outcome(outcome_folder / f"{SLUG}.quick.json")


def told(values):
    """The verdicts of the claims on some values."""
    study = find_study(SLUG)
    filled = {name: [min(0.5, q.high - 0.5)] * 3 for name, q in by_name(study.quantities).items()}
    _, claims, _ = judge(study.claims, by_name(study.quantities), {**filled, **values})
    return {claim["name"]: claim["verdict"] for claim in claims}


def test_a_quick_run_measures_everything(outcome, outcome_folder):
    assert outcome.quick and set(outcome.measures) == set(by_name(find_study(SLUG).quantities))
    json.dumps(outcome.details)
    assert not have_matplotlib() or (outcome_folder / f"{SLUG}.quick.png").stat().st_size > 10_000


def test_rules_can_come_out_either_way():
    dense = {"key_dense": [-0.1, -0.2, -0.1], "right_dense": [1.0, 1.0, 1.0]}
    good = {"key_tree": [-0.2, -0.2, -0.2], "right_tree": [1.0, 1.0, 1.0]}
    poor = {"key_random": [-2.5, -2.6, -2.4], "right_random": [0.0, 0.0, 0.0]}
    found = told({**dense, **good, **poor})
    assert found["retrieval"] == found["search"] == "holds"
    found = told({**dense, "key_tree": poor["key_random"], "right_tree": poor["right_random"]})
    assert found["retrieval"] == "does not hold here" and found["search"] != "holds"
    assert told({**good, **poor, "right_dense": [0.0, 0.1, 0.0]})["search"] == "cannot be told at this size"


def drawn(length=200):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, 8, generator=generator) for heads in (4, 2)]


def test_every_way_reads_as_many_keys():
    q, k = drawn()
    counts = {}
    for way in KEPT:
        spec, ctx = spec_of(way, **OPTIONS), Context.of(q, k)
        layout = Layout.of(ctx, 200, 200, q.device)
        seen = HiPMask(spec.build().chosen(q, k, ctx, layout), layout, spec).to_dense()
        assert not seen.triu(1).any()
        counts[way] = seen[:, :, 159].sum(-1).unique().tolist()  # the last row of its block
    assert all(found == [16 + 8 + 16] for found in counts.values()), counts


def test_the_oracle_keeps_the_most_and_chance_the_least():
    torch.manual_seed(7)
    q, k = drawn(400)
    kept = {way: what_is_kept(3 * q, k, spec_of(way, **OPTIONS))[0] for way in KEPT}
    assert kept["oracle"] > kept["tree"] > kept["random"]


def test_an_answer_is_judged_as_in_one_forward():
    model, tokenizer = subject(tiny=True)
    prompt, answer = Passkey(length=160, depth=0.5, seed=1).ids(tokenizer)
    found = answered(model, prompt, answer)
    key, right = log_probability(model, prompt, answer)
    assert found["key"] == pytest.approx(key, abs=1e-5) and found["right"] == float(right)
    loss = model(prompt, labels=prompt.index_fill(1, torch.arange(81), -100)).loss
    assert found["loss"] == pytest.approx(float(loss), abs=1e-5)
    with attending(model, "window", **OPTIONS):
        assert answered(model, prompt, answer)["key"] != found["key"]
    assert isinstance(spec_of("refresh", **OPTIONS), HiP) and spec_of("refresh", **OPTIONS).refresh == 8
