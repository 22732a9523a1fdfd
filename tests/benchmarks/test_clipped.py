"""The benchmark of clipped softmax runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import clipped, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_forward_and_training(capsys):
    assert clipped.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "'forward'" in printed and "'training'" in printed and "clipped_over_open" in printed


def test_it_tells_no_speed_of_a_wrong_result(monkeypatch, capsys):
    right = clipped.clipped_attention
    monkeypatch.setattr(clipped, "clipped_attention", lambda *x, **options: 1.01 * right(*x, **options))
    assert clipped.main(["--quick"]) == 1
    assert "off by" in capsys.readouterr().err
