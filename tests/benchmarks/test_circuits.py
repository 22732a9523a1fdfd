"""The benchmark of circuits runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import circuits, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


@pytest.mark.real
def test_it_prints_a_row_for_each_job_and_way(capsys):
    assert circuits.main(["--quick", "--prompts", "2"]) == 0
    printed = capsys.readouterr().out
    for job in ("paths to the logits", "paths to the queries of 5 heads", "residual stream, every layer"):
        assert f"{job}" in printed and printed.count(job) == 2
    assert "direct effects on the logits: regard" in printed


def test_it_refuses_what_differs():
    circuits._agree(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00005]), "x")
    with pytest.raises(circuits.WrongResult, match="x is off by 1.0e-03"):
        circuits._agree(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), "x")
