"""The study of lightning attention: a quick run, what its parts measure, and what would make claims fail."""

import pytest
import torch

from regard.studies import find_study, run
from regard.studies.lightning_attention import MODELS, growth, model_of
from regard.studies.picture import save_picture
from regard.studies.verdict import judge

SLUG = "lightning-attention"


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def judged(outcome, **changed):
    """Verdicts by claim, with some measures changed."""
    study = find_study(SLUG)
    values = {name: told["values"] for name, told in outcome.measures.items()} | changed
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, values)
    return {claim["name"]: claim["verdict"] for claim in claims}


def test_a_quick_run_is_exact_and_sees_the_fault(outcome):
    assert outcome.quick and judged(outcome)["exact"] == "holds"
    assert all(outcome.value(f"{name}_64") > 1 for name in MODELS)
    assert 1 < outcome.details["best"] < 2


def test_claims_fail_where_decay_would_not_help_or_time_would_grow(outcome):
    losses = {f"{name}_{length}": [2.5, 2.5, 2.51] for name in MODELS for length in (64, 256)}
    same = judged(outcome, **losses)
    assert same["alibi"] == same["paper"] == same["longer"] == "does not hold here"
    told = losses | {"none_64": [3.0, 3.0, 3.01], "softmax_256": [2.9, 2.9, 2.91]}
    better = judged(outcome, **told)
    assert better["alibi"] == better["paper"] == better["longer"] == "holds"
    flat = {"growth": [1.0, 1.0, 1.1], "growth_masked": [3.9, 4.0, 4.0]}
    assert judged(outcome, **flat)["speed"] == "holds"
    assert judged(outcome, **(flat | {"growth": [3.9, 4.0, 4.0]}))["speed"] == "does not hold here"


def test_time_a_token_is_compared_round_by_round():
    assert growth({"short": [1.0, 2.0], "long": [4.0, 16.0]}, "short", "long") == [1.0, 2.0]


def test_only_what_is_compared_differs():
    torch.manual_seed(0)
    tokens = torch.randint(32, (2, 9))
    models = {name: model_of(name).eval() for name in MODELS}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert sizes["alibi"] == sizes["paper"] == sizes["none"]
    weights = models["alibi"].state_dict()
    for name in ("paper", "none"):
        models[name].load_state_dict(weights)
    logits = {name: models[name](tokens).logits for name in ("alibi", "paper", "none")}
    assert torch.allclose(logits["alibi"][:, 0], logits["none"][:, 0], atol=1e-5)
    assert not torch.allclose(logits["alibi"][:, 5], logits["none"][:, 5], atol=1e-3)
    assert not torch.allclose(logits["alibi"][:, 5], logits["paper"][:, 5], atol=1e-3)


def test_the_picture(outcome, tmp_path):
    study = find_study(SLUG)
    assert save_picture(study(study.quick, 0), outcome, tmp_path).stat().st_size > 10_000
