"""The benchmarks of large-kernel and subspace attention run, and tell no speed where a result is wrong."""

import pytest
import torch

from benchmarks import machine, ulsam, visual_attention_network
from regard.attention import ULSAM, LargeKernelAttention

BOTH = (visual_attention_network, ulsam)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("benchmark", BOTH, ids=lambda module: module.__name__)
def test_it_prints_a_row_for_each_part(benchmark, capsys):
    assert benchmark.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{part}, " in printed for part in benchmark.PARTS)


@pytest.mark.parametrize(
    ("benchmark", "part", "kind"),
    [(visual_attention_network, "gate", LargeKernelAttention), (ulsam, "layer", ULSAM)],
)
def test_it_tells_no_speed_of_a_wrong_result(benchmark, part, kind, monkeypatch, capsys):
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.01 * forward(self, x))
    assert benchmark.main(["--quick", "--parts", part]) == 1
    assert "differs from" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", BOTH, ids=lambda module: module.__name__)
def test_a_folder_without_the_official_code_is_refused(benchmark, tmp_path, capsys):
    assert benchmark.main(["--quick", "--official", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
