"""The study of active-dormant heads: how heads are counted, and what would make its claims fail."""

import pytest
import torch

from regard.studies import find_study
from regard.studies.active_dormant_heads import TOYS, most
from regard.studies.active_dormant_heads_parts import extremes, kept, rises, trained
from regard.studies.verdict import judge
from tests.support.families import FAMILIES

SLUG = "active-dormant-heads"
HELD = {
    "sinks": [0.7, 0.72, 0.7], "sinks_random": [0.0, 0.0, 0.0], "drain": [0.2, 0.2, 0.21],
    "drain_random": [1.0, 1.0, 1.01], "peak": [100, 101, 102], "peak_random": [1.2, 1.2, 1.3],
    "kept": [20, 21, 22], "kept_halves": [1, 2, 1], "active": [0.2, 0.21, 0.2], "dormant": [0.0, 0.01, 0.0],
    "random": [0.1, 0.1, 0.1], "toy_sink": [0.9, 0.91, 0.9], "toy_sink_before": [0.05, 0.06, 0.05],
    "toy_copy": [0.95, 0.96, 0.95], "column": [60, 61, 60], "column_relu": [0.2, 0.2, 0.21],
    "toy_loss": [0.006, 0.006, 0.007], "toy_loss_relu": [0.009, 0.009, 0.009], "toy_drain": [0.1, 0.1, 0.11],
    "toy_drain_relu": [1.5, 1.5, 1.6], "toy_peak": [0.3, 0.3, 0.31], "deep_peak": [4.0, 4.1, 4.0],
    "sgd_peak": [1.0, 1.0, 1.1], "deep_sink": [0.8, 0.8, 0.81], "sgd_sink": [0.7, 0.7, 0.71],
    "deep_loss": [0.01, 0.01, 0.02], "sgd_loss": [0.01, 0.01, 0.02],
}  # fmt: skip


def judged(**changed):
    """Verdicts by claim, of values by which all hold, with some changed."""
    study = find_study(SLUG)
    _, claims, _ = judge(study.claims, {q.name: q for q in study.quantities}, HELD | changed)
    return {claim["name"]: claim["verdict"] for claim in claims}


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"sinks_random": [0.5, 0.5, 0.51]}, "extremes"),
        ({"peak": [5, 5, 5.1]}, "extremes"),
        ({"kept": [2, 2, 3]}, "contrast"),
        ({"kept_halves": [15, 15, 16]}, "contrast"),
        ({"active": [-0.2, -0.2, -0.21]}, "work"),
        ({"toy_sink": [0.3, 0.3, 0.31]}, "toy"),
        ({"column_relu": [40, 40, 41]}, "relu"),
        ({"toy_loss_relu": [0.5, 0.5, 0.51]}, "relu"),
        ({"toy_drain_relu": [0.1, 0.1, 0.11]}, "relu_drain"),
        ({"deep_peak": [0.3, 0.3, 0.31]}, "depth"),
        ({"sgd_peak": [4, 4, 4.1]}, "sgd"),
        ({"sgd_sink": [0.1, 0.1, 0.11]}, "sgd"),
    ],
)
def test_a_claim_fails_where_it_is_not_so(changed, claim):
    assert set(judged().values()) == {"holds"}
    verdicts = judged(**changed)
    assert verdicts[claim] == "does not hold here"


def test_heads_are_kept_by_size_and_sign():
    first = [[0.9, 0.1, 0.8, 0.5], [0.8, 0.2, 0.2, 0.5]]
    other = [[0.1, 0.9, 0.1, 0.5], [0.3, 0.8, 0.4, 0.5]]
    told = [[{"first": row} for row in rows] for rows in (first, other)]
    assert kept(*told) == [2.0]
    assert most({"peak.0": 1.0, "peak.1": 3.0, "sink.0": 9.0}, "peak") == 3.0


def test_parts_on_a_tiny_model():
    model = FAMILIES["llama"].build("sdpa")
    texts = {name: list(torch.randint(5, 97, (4, 12))) for name in ("prose", "code")}
    found = extremes(model, texts["prose"][0])
    assert len(found["first"]) == 8 and 0 <= found["sinks"] <= 1 and found["peak"] > 0
    rise = rises(model, texts, 1, 0, lambda share: None)
    assert {name: len(values) for name, values in rise.items()} == {"active": 4, "dormant": 4, "random": 4}
    assert any(rise["active"]) and rise["active"] != rise["dormant"]


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_trained_as_it_says(name):
    told = trained(**TOYS[name], steps=2, seed=0, tick=lambda share: None)
    assert told["steps"] == [0, 1, 2]
    assert told["layers"] == TOYS[name]["layers"]
    last = TOYS[name]["layers"] - 1
    assert f"sink.{last}" in told["measures"][0] and f"sink.{last + 1}" not in told["measures"][0]
