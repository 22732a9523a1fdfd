"""The benchmark of hiding inputs runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import machine, meap


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row(capsys):
    assert meap.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "hide_over_none" in printed and "draw_share" in printed


def test_it_tells_no_speed_of_a_wrong_result(monkeypatch, capsys):
    class Wrong(meap.MEAP):
        def hide(self, ids, **options):
            hidden, where = super().hide(ids, **options)
            return hidden, where.roll(1, 1)

    monkeypatch.setattr(meap, "MEAP", Wrong)
    assert meap.main(["--quick"]) == 1
    assert "hiding is off" in capsys.readouterr().err
