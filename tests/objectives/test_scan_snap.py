"""Scan and snap: the exact generator, the tables, the formulas against autograd, training and the flow."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard.errors import RegardError, ShapeMismatch
from regard.models.scan_snap import ScanSnapModel
from regard.objectives.scan_snap import flow, kendall, train_scan_snap
from regard.studies.scan_and_snap_parts import identity_errors
from regard.tasks.scan_snap import TokenComposition


def test_tokens_are_drawn_as_the_table_says():
    data = TokenComposition(num_last=2, next_per_last=2, num_common=3, num_distinct=2, weights=(1, 4))
    assert data.vocabulary == 3 + 8 + 2 + 4
    np.testing.assert_allclose(data.contexts[1, :9] * 8, [1, 1, 1, 0, 0, 1, 4, 0, 0])
    tokens, targets = data.draw(400, 50, torch.Generator().manual_seed(0))
    number = targets - 13
    assert torch.equal(tokens[:, -1], 11 + number // 2)
    for n in range(4):
        found = torch.bincount(tokens[number == n, :-1].flatten(), minlength=17).double()
        np.testing.assert_allclose(found / found.sum(), data.contexts[n], atol=0.02)


def test_the_model_attends_by_position():
    torch.manual_seed(0)
    model = ScanSnapModel(7, start=1.0, dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 2, 5, 3], [0, 0, 4, 1, 6]])
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        b = model.z[row[-1], row[:-1]].softmax(0)
        c = torch.zeros(7, dtype=torch.float64).index_add(0, torch.tensor(row[:-1]), b)
        torch.testing.assert_close(logits, c / c.norm() @ model.y)
    seen = ScanSnapModel(7, include_query=True)
    assert seen.counted(tokens)[0][0, 3] == 1 and model.counted(tokens)[0][0, 3] == 0


def test_lemma_1_is_what_autograd_gives():
    torch.manual_seed(0)
    data = TokenComposition(next_per_last=2)
    model = ScanSnapModel(data.vocabulary, start=0.5, dtype=torch.float64)
    tokens, targets = data.draw(64, 32)
    found = model.gradients(*model.counted(tokens), targets, torch.full((64,), 1 / 64, dtype=torch.float64))
    F.cross_entropy(model(tokens), targets).backward()
    torch.testing.assert_close(found.z, -model.z.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.y, -model.y.grad, rtol=0, atol=1e-12)
    assert found.z.abs().max() > 1e-3


def test_the_first_step_moves_the_decoder_alone():
    data = TokenComposition()
    seen = train_scan_snap(data, steps=1, batch=8, length=16)
    assert not seen.z.any() and seen.y.any() and seen.measures["speed"] == [0.0, 0.0]


def test_small_setting_scans_and_snaps():
    seen = train_scan_snap(TokenComposition(), steps=60)
    common, speed = seen.measures["common"], seen.measures["speed"]
    assert common[0] == pytest.approx(10 / 15.5) and common[-1] < 0.7 * common[0]
    assert seen.measures["entropy"][0] == pytest.approx(2.899, abs=1e-3)
    assert min(seen.measures["tau"]) == 1.0 and seen.measures["top"][-1] > 0.15
    assert max(speed) > 10 * speed[-1] and 20 < seen.snap < 60
    frozen = train_scan_snap(TokenComposition(), steps=5, rate_z=0.0)
    assert frozen.measures["common"] == [pytest.approx(10 / 15.5)] * 6
    nothing = train_scan_snap(TokenComposition(num_last=1, next_per_last=2, shared=True), steps=20)
    assert nothing.measures["loss"][-1] == pytest.approx(math.log(2), abs=0.02)
    assert float(nothing.z.abs().max()) < 0.2 * float(seen.z.abs().max())


def test_one_seed_gives_one_history():
    one, same, other = (train_scan_snap(TokenComposition(), steps=3, seed=s) for s in (0, 0, 1))
    assert one.measures == same.measures != other.measures
    assert train_scan_snap(TokenComposition(), steps=3, optimiser="adam", rate_z=0.1).z.any()


def test_the_flow_is_the_mean_of_long_samples_and_obeys_theorem_3():
    data = TokenComposition()
    exact = flow(data, steps=20, size=1.0)
    model = ScanSnapModel(data.vocabulary, dtype=torch.float64)
    sampled = train_scan_snap(data, model, steps=20, batch=256, length=1500, momentum=0.0)
    assert exact.measures["common"][-1] == pytest.approx(sampled.measures["common"][-1], abs=2e-3)
    fast, equal = (identity_errors(data, flow(data, steps=300, size=0.03, rate_y=r)) for r in (300, 1))
    assert max(fast) < 1e-3 and max(fast) < max(equal) / 10


def test_histories_are_written(tmp_path):
    seen = flow(TokenComposition(), steps=2)
    seen.to_csv(tmp_path / "seen.csv")
    seen.to_json(tmp_path / "seen.json")
    head, *rows = (tmp_path / "seen.csv").read_text().splitlines()
    assert head == "step,loss,entropy,common,top,tau,speed" and len(rows) == 3


def test_rank_correlation():
    assert kendall([1, 2, 3], [4, 5, 9]) == 1 and kendall([1, 2, 3], [9, 5, 4]) == -1
    assert kendall([1, 2, 3], [2, 1, 3]) == pytest.approx(1 / 3) and math.isnan(kendall([1, 1], [1, 2]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TokenComposition(num_distinct=0), "1 or more"),
        (lambda: TokenComposition(num_distinct=2, weights=(1, 0)), "2 numbers above 0"),
        (lambda: TokenComposition(num_last=1), "two next tokens"),
        (lambda: TokenComposition().draw(2, 1), "at least 1 and 2"),
        (lambda: train_scan_snap(TokenComposition(), rate_z=-1), "0 at least"),
        (lambda: train_scan_snap(TokenComposition(), optimiser="lion"), "sgd, adam"),
        (lambda: flow(TokenComposition(), size=0), "above 0"),
        (lambda: train_scan_snap(TokenComposition(), steps=9, rate_z=1e38, rate_y=1e38), r"step \d+ is nan"),
    ],
)  # fmt: skip
def test_refusals(make, said):
    with pytest.raises(RegardError, match=said):
        make()


def test_refuses_one_token():
    with pytest.raises(ShapeMismatch, match="two or more"):
        ScanSnapModel(5)(torch.zeros(2, 1, dtype=torch.long))
