"""The benchmark of landmark attention runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import landmark, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_part(capsys):
    assert landmark.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("'lm_benchmark'", "'decode', 512", "'read', 512"))


def test_it_tells_no_speed_of_a_wrong_softmax(monkeypatch, capsys):
    right = landmark.landmark_attention
    monkeypatch.setattr(
        landmark, "landmark_attention", lambda *x, impl=None: right(*x, impl=impl) * (1.001 if impl else 1)
    )
    assert landmark.main(["--quick"]) == 1
    assert "differs from the definition" in capsys.readouterr().err


def test_a_folder_without_the_official_code_is_refused(tmp_path, capsys):
    assert landmark.main(["--quick", "--official", str(tmp_path)]) == 1
    assert "is not there" in capsys.readouterr().err
