"""The benchmark of watching runs, and tells no speed where a result is wrong."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from benchmarks import checks, machine, watch
from benchmarks.errors import WrongResult
from regard.engines import rows, stats

FLOOR = {"matmul": 1e11, "bytes": 1e10, "exp": 1e9}


@pytest.fixture(scope="module")
def small():
    """A model of two layers that reads the default model's tokens, and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), regard.load()[1]


@pytest.fixture(autouse=True)
def quick(small, monkeypatch):
    """The benchmark on the small model, above a floor that is given."""
    monkeypatch.setattr(watch, "load", lambda: small)
    monkeypatch.setattr(machine, "floor", lambda quick: FLOOR)


@pytest.fixture(autouse=True)
def gradients():
    """Benchmarks switch gradients off for good."""
    yield
    torch.set_grad_enabled(True)


def test_quick_prints_the_machine_the_floor_and_the_ratio(capsys, tmp_path):
    out = tmp_path / "found.json"
    assert watch.main(["--quick", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("cpu", "threads", "torch", "floor", "matmul", "plain_s", "watched_s", "ratio"):
        assert word in shown
    (row,) = json.loads(out.read_text())["watch"]["rows"]
    assert row["case"] == 64 and row["machine"]["threads"] == 2
    assert len(row["times"]["seconds"]["watched"]) == 2
    assert row["floor_s"] > 0 and row["plain_s"] > 0 and row["watched_s"] > 0


def test_a_wrong_statistic_is_refused(capsys, monkeypatch):
    right = stats.softmax_entropy
    monkeypatch.setattr(stats, "softmax_entropy", lambda *a, **k: right(*a, **k) * 1.01)
    assert watch.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "no speed is told: lenses: entropy" in shown.err and shown.out == ""


def test_wrong_logits_are_refused(small, monkeypatch):
    model, tokenizer = small
    ids = watch.text_ids(tokenizer, 16)

    def larger(out, x, block):
        rows.mix_into(out, x, block)
        out[:, :, block.start : block.stop] *= 1.01

    with torch.no_grad():
        checks.check_logits(model, ids)
        monkeypatch.setattr("regard.runtime.pipeline.mix_into", larger)
        with pytest.raises(WrongResult, match="logits at 16 tokens"):
            checks.check_logits(model, ids)
