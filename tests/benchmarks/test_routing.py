"""The benchmark of routing attention runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import machine, routing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_part(capsys):
    assert routing.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("'train', 256", "'scale', 512", "'decode', 256"))


def test_it_tells_no_speed_of_wrong_heads(monkeypatch, capsys):
    right = routing.RoutingHeads.forward
    monkeypatch.setattr(routing.RoutingHeads, "forward", lambda *given: right(*given) * 1.001)
    assert routing.main(["--quick"]) == 1
    assert "differs from its definition" in capsys.readouterr().err


def test_a_folder_without_the_public_code_is_refused(tmp_path, capsys):
    assert routing.main(["--quick", "--peer", str(tmp_path)]) == 1
    assert "holds no routing_transformer" in capsys.readouterr().err


def test_the_exponent_is_that_of_a_power():
    assert routing._exponent([4, 16, 64], [8.0, 64.0, 512.0]) == pytest.approx(1.5)
