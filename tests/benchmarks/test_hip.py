"""The benchmark of HiP attention runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import hip, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_length(capsys):
    assert hip.main(["--quick", "--parts", "prefill", "decode"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("'prefill', 1200", "'decode', 1600", "grows"))


def test_growth_is_told_over_what_is_due():
    k = hip.SPEC.k
    rows = [{"case": ["prefill", n * k], "hip_ms": ms} for n, ms in ((2, 5.0), (8, 60.0), (8, 120.0))]
    assert [row["grows"] for row in hip.grown(rows)] == [1.0, 1.0, 2.0]


def test_it_tells_no_speed_of_a_wrong_result(monkeypatch, capsys):
    right = hip.hip_attention
    monkeypatch.setattr(hip, "hip_attention", lambda *x: right(*x) * 1.001)
    assert hip.main(["--quick"]) == 1
    assert "differs from its definition" in capsys.readouterr().err
