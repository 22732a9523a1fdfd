"""The benchmark of bi-level routing attention runs, and tells no speed where a result is wrong."""

import sys

import pytest
import torch

from benchmarks import biformer, machine
from regard.attention import BRA

OFFICIAL = """
from torch import nn
from regard.attention import BRA


class nchwBRA(BRA):
    def __init__(self, dim, num_heads, n_win, topk, side_dwconv):
        super().__init__(dim, num_heads, n_win, topk, side_dwconv)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) * FACTOR
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name == "ops" or name.startswith("ops.")]:
        del sys.modules[name]


def checkout(folder, factor):
    """A stand-in for the official code, times a factor."""
    (folder / "ops").mkdir()
    (folder / "ops" / "bra_nchw.py").write_text(OFFICIAL.replace("FACTOR", str(factor)))
    return str(folder)


def test_it_prints_a_row_for_each_part_and_direction(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(biformer.importlib.util, "find_spec", lambda name: None)
    assert biformer.main(["--quick", "--official", checkout(tmp_path, 1)]) == 0
    printed = capsys.readouterr().out
    rows = [f"{part}, 14 x 14, dim 16, forward" for part in biformer.PARTS]
    assert all(name in printed for name in (*rows, f"{rows[0]} and backward", "nchw_over_ours", "vit_mb"))


def test_only_what_is_asked_for(capsys):
    assert biformer.main(["--quick", "--parts", "block"]) == 0
    printed = capsys.readouterr().out
    assert "block, 14" in printed and "layer, 14" not in printed and "nchw" not in printed


def test_it_tells_no_speed_of_a_result_that_is_not_the_official_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(biformer.importlib.util, "find_spec", lambda name: None)
    assert biformer.main(["--quick", "--official", checkout(tmp_path, 1.001)]) == 1
    assert "differs from the official nchw by" in capsys.readouterr().err


def test_it_tells_no_speed_of_a_result_that_is_not_the_definition(capsys, monkeypatch):
    right = BRA.forward
    monkeypatch.setattr(BRA, "forward", lambda self, x: right(self, x) * 1.001)
    assert biformer.main(["--quick", "--parts", "layer"]) == 1
    assert "differs from the definition by" in capsys.readouterr().err


def test_a_folder_without_the_official_code_is_refused(capsys, tmp_path):
    assert biformer.main(["--quick", "--official", str(tmp_path)]) == 1
    assert "has no ops/bra_nchw.py" in capsys.readouterr().err
