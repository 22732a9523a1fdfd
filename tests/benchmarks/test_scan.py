"""The benchmark of the recurrence runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import machine, scan, scan_gpu


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_decay_and_length(capsys):
    assert scan.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(f"[256, '{kind}" in printed for kind in scan.KINDS)
    assert "[512, 'head, 512']" in printed and "tokens/s over those at 128" in printed
    assert "fla" not in printed


def test_peers_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match="there is no .*naive.py"):
        scan.main(["--quick", "--parts", "peers", "--fla", str(tmp_path)])


def test_it_tells_no_speed_of_a_wrong_scan(monkeypatch, capsys):
    right = scan.scan
    monkeypatch.setattr(scan, "scan", lambda q, k, v, decay: (1.001 * right(q, k, v, decay)[0], None))
    assert scan.main(["--quick"]) == 1
    assert "off by" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(capsys):
    assert scan_gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.scan_gpu needs a CUDA GPU, and torch sees none here.\n"
