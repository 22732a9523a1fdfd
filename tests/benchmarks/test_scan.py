"""The benchmark of the recurrence runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import machine, scan


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_decay(capsys):
    assert scan.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(f"'{kind}'" in printed for kind in scan.KINDS)


def test_it_tells_no_speed_of_a_wrong_scan(monkeypatch, capsys):
    right = scan.scan
    monkeypatch.setattr(scan, "scan", lambda q, k, v, decay: (1.001 * right(q, k, v, decay)[0], None))
    assert scan.main(["--quick"]) == 1
    assert "off by" in capsys.readouterr().err
