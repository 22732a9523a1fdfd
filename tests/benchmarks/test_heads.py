"""The benchmark of needle tests runs, and tells no speed where the lens and the definition differ."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from benchmarks import heads, machine


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The benchmark on a model of two layers, above a floor that is given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval(), regard.load()[1]
    monkeypatch.setattr(heads, "load", lambda: model)
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    yield
    torch.set_grad_enabled(True)


@pytest.mark.real
def test_it_runs_and_keeps_its_figures(tmp_path, capsys):
    assert heads.main(["--quick", "--out", str(tmp_path / "heads.json")]) == 0
    row = json.loads((tmp_path / "heads.json").read_text())["heads"]["rows"][0]
    assert row["ratio"] > 0 and row["eager_over_copying"] > 0
    assert "10 tokens after 96" in capsys.readouterr().out


@pytest.mark.real
def test_a_wrong_score_tells_no_speed(monkeypatch, capsys):
    monkeypatch.setattr(heads, "_by_definition", lambda out, asked: torch.ones(8, dtype=torch.double))
    assert heads.main(["--quick"]) == 1
    assert "no speed is told: scores of the lens" in capsys.readouterr().err
