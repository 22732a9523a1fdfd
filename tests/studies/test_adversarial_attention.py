"""The two studies of adversarial attention: quick runs, conditions that differ in one thing, pictures."""

import pytest

from regard.objectives.adversarial import AttentionAdversary, AttentionVirtualAdversary
from regard.studies import FAILS, find_study, read_outcome, run
from regard.studies import adversarial_attention_parts as parts
from regard.studies.picture import save_picture
from regard.studies.verdict import judge

SLUGS = ("attention-adversarial-training", "attention-virtual-adversarial-training")


@pytest.fixture(scope="module", params=SLUGS)
def outcome(request):
    """A quick run of each."""
    return run(request.param, quick=True)


def test_a_quick_run_measures_and_draws(outcome, tmp_path):
    study = find_study(outcome.study)
    assert outcome.quick and set(outcome.measures) == {q.name for q in study.quantities}
    save_picture(study(study.quick, 0), outcome, tmp_path)
    assert next(tmp_path.glob("*.png")).stat().st_size > 5000
    if outcome.study == SLUGS[0]:
        assert outcome.value("raised_at") > 0.9 > 0.1 > outcome.value("raised_published")
    else:
        assert outcome.value("power_kl") > outcome.value("start_kl") > 0


def test_conditions_are_what_their_names_say():
    assert parts.adversary_of("none", 5.0) is None
    assert parts.adversary_of("published", 5.0) == AttentionAdversary(eps=5.0, variant="published")
    assert parts.adversary_of("vat", 5.0) == AttentionVirtualAdversary(eps=5.0)
    assert parts.adversary_of("random_vat", 5.0) == AttentionVirtualAdversary(eps=5.0, variant="random")


@pytest.mark.parametrize(
    ("slug", "swapped"),
    [
        (SLUGS[0], {"small_at_loss": "small_none_loss", "small_none_loss": "small_at_loss"}),
        (
            SLUGS[1],
            {
                "cues_unlabelled_attacked": "cues_none_attacked",
                "cues_none_attacked": "cues_unlabelled_attacked",
            },
        ),
    ],
)
def test_a_claim_falls_where_the_control_does_better(slug, swapped, results):
    study, kept = find_study(slug), read_outcome(results / f"{slug}.json")
    values = {name: told["values"] for name, told in kept.measures.items()}
    verdict, *_ = judge(study.claims, {q.name: q for q in study.quantities}, values)
    assert verdict == kept.verdict
    other = {name: values[swapped.get(name, name)] for name in values}
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, other)
    before = {claim["name"]: claim["verdict"] for claim in kept.claims}
    after = {claim["name"]: claim["verdict"] for claim in claims}
    assert before["robust"] != after["robust"] == FAILS


@pytest.fixture
def results():
    """Where committed outcomes are."""
    from pathlib import Path

    return Path(__file__).resolve().parent.parent.parent / "docs" / "results"
