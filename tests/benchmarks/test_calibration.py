"""The benchmark of head filtering runs, and tells no speed where replay and a whole forward differ."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from benchmarks import calibration, machine


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The benchmark on a model of three layers, above a floor that is given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval(), regard.load()[1]
    monkeypatch.setattr(calibration, "load", lambda: model)
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    yield
    torch.set_grad_enabled(True)


@pytest.mark.real
def test_it_runs_and_keeps_its_figures(tmp_path, capsys):
    assert calibration.main(["--quick", "--out", str(tmp_path / "calibration.json")]) == 0
    rows = json.loads((tmp_path / "calibration.json").read_text())["calibration"]["rows"]
    assert [row["heads_timed"] for row in rows] == [2, 2] and all(row["seconds"] > 0 for row in rows)
    assert "replay, 12 heads, 4 prompts of" in capsys.readouterr().out


@pytest.mark.real
def test_another_gain_tells_no_speed(monkeypatch, capsys):
    monkeypatch.setattr(calibration, "ACT", lambda heads: regard.edit.ACT(heads, beta=0.0, threshold=0.0))
    assert calibration.main(["--quick"]) == 1
    assert "replay and a whole forward differ" in capsys.readouterr().err
