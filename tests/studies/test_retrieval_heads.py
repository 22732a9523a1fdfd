"""The study of retrieval heads: what one seed measures, and what would make its claims fail."""

import types

import pytest
import torch

from regard.edit import ScaleHeads
from regard.studies import find_study
from regard.studies import retrieval_heads_parts as parts
from regard.studies.base import by_name
from regard.studies.outcome import read_outcome
from regard.studies.picture import save_picture
from regard.studies.retrieval_heads import farthest
from regard.studies.verdict import judge
from tests.lens.test_retrieval_heads import copier
from tests.tasks.test_needles import tokenizer  # noqa: F401

SLUG = "retrieval-heads"


def test_sets_share_no_fact_and_seeds_part_them_anew(tokenizer):  # noqa: F811
    size = types.SimpleNamespace(facts=5, length=160)
    one, two = parts.needles(tokenizer, size, 1)
    assert len(one) == len(two) == 5 and not set(one.facts) & set(two.facts)
    other, _ = parts.needles(tokenizer, size, 2)
    assert set(other.facts) != set(one.facts)
    again, _ = parts.needles(tokenizer, size, 1)
    assert all(a.ids.equal(b.ids) for a, b in zip(one, again, strict=True))


def test_perplexity_is_the_exponent_of_the_mean_loss(monkeypatch):
    model = copier()
    texts = ["3 4 5 6 7", "2 9 9 1"]
    monkeypatch.setattr(parts, "passages", lambda: [types.SimpleNamespace(text=text) for text in texts])
    read = lambda text, **_: {"input_ids": torch.tensor([[int(word) for word in text.split()]])}  # noqa: E731
    losses = []
    for text in texts:
        ids = read(text)["input_ids"]
        losses.append(
            torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        )
    expected = torch.cat(losses).mean().exp().item()
    assert parts.perplexity(model, read, 2) == pytest.approx(expected, rel=1e-5)
    assert parts.perplexity(model, read, 2, ScaleHeads(heads=[(0, 0)])) != pytest.approx(expected)


def test_the_farthest_draw_is_named_on_either_side():
    assert farthest([0.9, 0.5, 1.0], 0.8) == 0.5 and farthest([0.9, 0.75], 0.8) == 0.9


@pytest.fixture(scope="module")
def committed():
    return read_outcome("docs/results/retrieval-heads.json")


def told(kind, values):
    return {
        claim["name"]: claim["verdict"] for claim in judge(kind.claims, by_name(kind.quantities), values)[1]
    }


def test_rules_can_come_out_either_way(committed):
    kind = find_study(SLUG)
    values = {name: list(found["values"]) for name, found in committed.measures.items()}
    same = {**values, "needle_top": values["needle"], "needle_uniform": values["needle"]}
    assert told(kind, same)["needle"] != "holds" and told(kind, same)["uniform"] == "does not hold here"
    assert told(kind, {**values, "needle_random": values["needle_top"]})["specific"] != "holds"
    assert told(kind, {**values, "correlation": [0.3] * 5})["stable"] == "does not hold here"
    dear = [2 * x for x in values["perplexity"]]
    assert told(kind, {**values, "perplexity_top": dear})["perplexity"] == "does not hold here"
    assert told(kind, {**values, "knowing_top": [0.1] * 5})["knowing"] == "does not hold here"
    assert told(kind, {**values, "copying_top": values["copying_random"]})["copying"] != "holds"


def test_the_picture_is_drawn_from_the_outcome(committed, tmp_path):
    kind = find_study(SLUG)
    path = save_picture(kind(kind.full, 0), committed, tmp_path)
    assert path is not None and path.stat().st_size > 20_000


@pytest.mark.real
def test_one_seed_of_the_real_model_measures_everything():
    from dataclasses import replace

    kind = find_study(SLUG)
    study = kind(replace(kind.quick, facts=1, length=80), 0)
    study.prepare()
    result = {"seed 0": study.one(0)}
    assert set(study.measure(result)) == {quantity.name for quantity in kind.quantities}
    assert result["seed 0"]["needle"] == 1.0, "SmolLM2 answers"
    assert result["seed 0"]["needle_top"] < 1.0
    assert len(study.details(result)["map"]) == 30
