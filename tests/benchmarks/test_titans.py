"""The benchmark of neural memories runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import machine, titans


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_memory_and_layer(capsys):
    assert titans.main(["--quick", "--parts", "memory", "decode"]) == 0
    printed = capsys.readouterr().out
    assert all(f"'{name}'" in printed for name in (*titans.MEMORIES, *titans.LAYERS))


def test_it_tells_no_speed_of_a_wrong_memory(monkeypatch, capsys):
    right = titans.neural_memory

    def wrong(*tensors, **options):
        out, memory = right(*tensors, **options)
        return 1.001 * out, memory

    monkeypatch.setattr(titans, "neural_memory", wrong)
    assert titans.main(["--quick"]) == 1
    assert "off by" in capsys.readouterr().err
