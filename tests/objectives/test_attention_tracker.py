"""The tracker of attention: its numbers on a known model, and inside the Hugging Face Trainer."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

import regard
from regard.errors import RegardError, ShapeMismatch
from regard.objectives.attention_tracker import AttentionTracker
from tests.support.families import FAMILIES

IDS = torch.arange(10, 22).view(2, 6)


def test_numbers_are_those_of_the_weights():
    model = FAMILIES["llama"].build("sdpa")
    tracker = AttentionTracker(model, IDS, common=[11, 17])
    tracker.record(0)
    with torch.no_grad(), regard.watch(model) as seen:
        model(input_ids=IDS)
    rows = torch.stack([seen.weights(1, 2, b)[1:] for b in (0, 1)]).double()
    found = next(row for row in tracker.rows if row["site"] == "text.1" and row["head"] == 2)
    assert found["entropy"] == pytest.approx(float(torch.special.entr(rows).sum(-1).mean()), rel=1e-5)
    assert found["common"] == pytest.approx(float(rows[..., 1].mean()), rel=1e-5)
    rest = rows[..., 1:] / rows[..., 1:].sum(-1, keepdim=True)
    assert found["open"] == pytest.approx(float(torch.special.entr(rest).sum(-1).mean()), rel=1e-5)
    assert found["speed"] != found["speed"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    tracker.record(1)
    even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    moved = next(row for row in tracker.rows[8:] if row["site"] == "text.1" and row["head"] == 2)
    assert moved["speed"] == pytest.approx(float((rows - even[1:]).abs().sum(-1).mean()), rel=1e-4)


def test_the_snap_is_where_the_speed_stays_low():
    tracker = AttentionTracker(FAMILIES["llama"].build("sdpa"), IDS)
    for step, speed in enumerate((float("nan"), 1.0, 0.02, 0.3, 0.04, 0.01)):
        tracker.rows.append({"step": step, "site": "text.0", "head": 0, "speed": speed})
    assert tracker.snap() == 4 and tracker.snap("text.0") == 4


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_in_the_trainer(tmp_path, ending):
    model = FAMILIES["llama"].build("sdpa")
    out = tmp_path / f"seen.{ending}"
    tracker = AttentionTracker(model, IDS, every=2, out=out)
    data = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]
    options = TrainingArguments(
        tmp_path / "run", max_steps=4, learning_rate=1e-2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, options, train_dataset=data, callbacks=[tracker]).train()
    assert [step for step, _ in tracker.mean("entropy")] == [0, 2, 4]
    assert all(value > 0 for _, value in tracker.mean("speed")[1:])
    text = out.read_text()
    assert len(list(tracker.table.rows())) == 3 * 8
    assert "text.1" in text and (ending == "csv" or json.loads(text))


def test_refusals():
    model = FAMILIES["llama"].build("sdpa")
    with pytest.raises(RegardError, match="every is 0"):
        AttentionTracker(model, IDS, every=0)
    with pytest.raises(ShapeMismatch, match="two tokens or more"):
        AttentionTracker(model, IDS[:, :1])
    with pytest.raises(RegardError, match=r"end in \.csv or \.json"):
        AttentionTracker(model, IDS, out="seen.txt")
    with pytest.raises(RegardError, match="no column 'mass'"):
        AttentionTracker(model, IDS).mean("mass")
