"""The benchmark of steering runs, and tells no speed where an edit does something else."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from benchmarks import machine, steering


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A model of two layers that reads the default model's tokens, above a floor that is given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    small = LlamaForCausalLM(config).eval(), regard.load()[1]
    monkeypatch.setattr(steering, "load", lambda: small)
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_a_row_for_each_edit_and_the_idle_session(capsys, tmp_path):
    out = tmp_path / "found.json"
    assert steering.main(["--quick", "--out", str(out)]) == 0
    cases = [row["case"] for row in json.loads(out.read_text())["steering"]["rows"]]
    assert len(cases) == 11 and cases[0] == "no edit, no lens; 32 cached"
    assert "act, 3 heads of 1 layer; 32 cached" in cases and "plain_ms" in capsys.readouterr().out


def test_weights_that_are_not_halved_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(steering, "_halved", lambda weights, block: weights * 0.1)
    assert steering.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "no speed is told: edit-weights" in shown.err and shown.out == ""
