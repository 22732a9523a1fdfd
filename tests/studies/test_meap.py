"""The study of MEAP: a quick run, its arms and measures, and what would make its claims fail."""

import pytest
import torch

from regard.studies import find_study, run
from regard.studies import meap_parts as parts
from regard.studies.meap import learning, mean_at
from regard.studies.picture import save_picture
from regard.studies.threads import one_thread
from regard.studies.verdict import judge

SLUG = "meap"
ARMS = ("plain", "meap", "random")


@pytest.fixture(scope="module")
def outcome():
    """A quick run, once for all tests here."""
    return run(SLUG, quick=True)


def test_a_quick_run_measures_every_arm(outcome):
    assert outcome.quick and outcome.value("same") == 0 < outcome.value("changed")
    curves = outcome.details["curves"]
    assert sorted(curves) == sorted(ARMS) and all(len(one["answers"][0]) == 3 for one in curves.values())
    first = {tuple(one["filler"][0][:1]) for one in curves.values()}
    assert len(first) == 1, "all begin with the same weights"
    assert len({one["filler"][0][-1] for one in curves.values()}) == 3
    assert outcome.value("fact_even") == pytest.approx(2 / 58, rel=0.1)


def test_arms_read_the_same_batches_in_their_way():
    inputs = torch.randint(parts.TASK.vocabulary, (8, 64), generator=torch.Generator().manual_seed(0))
    hidden, noise = (parts.corrupted(arm, inputs, 3, 5) for arm in ("meap", "random"))
    assert parts.corrupted("plain", inputs, 3, 5) is inputs
    where = hidden == parts.MASK
    assert (where.sum(1) == 9).all() and torch.equal(hidden[~where], inputs[~where])
    assert torch.equal(noise[~where], inputs[~where]) and not (noise == parts.MASK).any()
    assert (noise[where] != inputs[where]).float().mean() > 0.8
    assert not torch.equal(hidden, parts.corrupted("meap", inputs, 3, 6))


def test_attention_is_measured_by_the_definition():
    model = parts.model_of(0).eval()
    made = parts.TASK.batch(6, torch.Generator().manual_seed(0))
    found = parts.attention(model, made, 0)
    weights = torch.stack(parts.matrices(model, made.tokens[:, :-1])).detach()  # [L, B, H, T, T]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert float(weights.triu(1).abs().max()) == 0
    total = 0.0
    for row in range(6):
        for answer, place in zip(made.answers[row].tolist(), made.places[row].tolist(), strict=True):
            total += float(weights[:, row, :, answer - 1, place - 1 : place + 1].sum(-1).mean())
    assert found["fact"] == pytest.approx(total / 24, rel=1e-4)
    for mixer in model.mixers:
        torch.nn.init.zeros_(mixer.queries.weight)
        torch.nn.init.zeros_(mixer.queries.bias)
    even = parts.attention(model, made, 0)
    assert even["fact"] == pytest.approx(even["fact_even"], rel=1e-4)
    alpha = torch.tensor([sum(1 / (i + 1) for i in range(k, 64)) / (64 - k) for k in range(64)])
    assert even["masked"] == pytest.approx(float(alpha.mean()), rel=0.2)
    assert even["spread"] == pytest.approx(float(alpha.var(correction=0)), rel=0.3)


def test_training_learns_filler():
    with torch.random.fork_rng(), one_thread():
        told = parts.trained("meap", 0, 24, 24, 32, lambda share: None)
    assert told["filler"][-1] < told["filler"][0] - 1 and told["steps"] == [0, 24]


def test_answers_are_compared_while_plain_training_learns():
    assert learning([0.1, 0.3, 0.5, 0.8, 0.81]) == [1, 2, 3]
    assert mean_at([0.1, 0.3, 0.5], [1, 2]) == pytest.approx(0.4) and mean_at([0.1], []) != mean_at([0.1], [])


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("exact", {"same": [1e-3] * 3}),
        ("exact", {"changed": [0.0] * 3}),
        ("masked keys", {"masked_meap": [0.05, 0.051, 0.05]}),
        ("masked keys", {"masked_random": [0.005, 0.0051, 0.005]}),
        ("clean loss", {"filler_meap": [1.1, 1.11, 1.1]}),
        ("retrieval", {"answers_meap": [0.3, 0.31, 0.3]}),
        ("not noise", {"answers_random": [0.9, 0.91, 0.9]}),
        ("not noise", {"curve_random": [0.9, 0.91, 0.9]}),
        ("whole curve", {"curve_plain": [0.9, 0.91, 0.9]}),
        ("spread", {"spread_meap": [0.0001, 0.00011, 0.0001]}),
        ("fact", {"fact_meap": [0.1, 0.11, 0.1]}),
    ],
)
def test_every_claim_can_fail(claim, values):
    good = {
        "same": [0.0] * 3, "changed": [0.1, 0.11, 0.1], "fact_even": [0.03] * 3,
        **{f"{kind}_{arm}": [level, level + 0.01, level] for kind in ("answers", "curve", "end")
           for arm, level in (("plain", 0.5), ("meap", 0.7), ("random", 0.4))},
        **{f"filler_{arm}": [1.0, 1.001, 1.0] for arm in ARMS},
        **{f"masked_{arm}": [level, level + 0.001, level]
           for arm, level in (("plain", 0.02), ("meap", 0.01), ("random", 0.021))},
        **{f"spread_{arm}": [level, level + 0.0001, level]
           for arm, level in (("plain", 0.001), ("meap", 0.002), ("random", 0.001))},
        **{f"fact_{arm}": [level, level + 0.01, level]
           for arm, level in (("plain", 0.2), ("meap", 0.4), ("random", 0.2))},
    }  # fmt: skip
    study = find_study(SLUG)
    quantities = {q.name: q for q in study.quantities}
    before = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, good)[1]}
    after = {c["name"]: c["verdict"] for c in judge(study.claims, quantities, {**good, **values})[1]}
    assert before[claim] == "holds" and after[claim] == "does not hold here"


def test_the_picture_is_drawn_from_the_outcome(outcome, tmp_path):
    study = find_study(SLUG)
    path = save_picture(study(study.quick, 0), outcome, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 30_000
