"""The benchmark of NiNformer runs, and tells no speed where a result is wrong."""

import pytest
import torch
from torch import nn

from benchmarks import machine, ninformer
from regard.attention.ninformer import NiNBlock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


class Official:
    """What stands in for the official module: the definition, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def NiNBlock(self, dim, hidden, tokens, dropout):
        factor = self.factor

        class Theirs(NiNBlock):
            def forward(self, x, valid=None):
                return factor * self.reference(x)

        return Theirs(dim, tokens, hidden, dropout=dropout)


def test_it_prints_a_row_for_each_size(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ninformer, "read", lambda folder: Official(1.0))
    assert ninformer.main(["--quick", "--official", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*ninformer.SMALL, "16 tokens", "official_trained_over_ours"))


def test_only_what_is_asked_for(capsys):
    assert ninformer.main(["--quick", "--parts", "tokens"]) == 0
    printed = capsys.readouterr().out
    assert "4 tokens" in printed and "official" not in printed


def test_it_tells_no_speed_of_a_wrong_result(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ninformer, "read", lambda folder: Official(1.001))
    assert ninformer.main(["--quick", "--official", str(tmp_path)]) == 1
    assert "differs from the official code" in capsys.readouterr().err
    monkeypatch.setattr(NiNBlock, "forward", lambda block, x, valid=None: 1.001 * block.reference(x))
    assert ninformer.main(["--quick", "--parts", "sizes"]) == 1
    assert "differs from the definition" in capsys.readouterr().err


def test_a_folder_without_the_official_code_is_told(tmp_path, capsys):
    (tmp_path / "ninformer.py").write_text("import no_such_package_here")
    assert ninformer.main(["--quick", "--official", str(tmp_path)]) == 1
    assert "holds no official ninformer.py" in capsys.readouterr().err


def test_operations_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    block = NiNBlock(8, 9, 12)
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(2, 9, 8))
    assert counter.get_total_flops() // 2 == ninformer.operations(2, 9, 8, 12)
    assert isinstance(ninformer.vit_block(9, 8, 12), nn.Module)
