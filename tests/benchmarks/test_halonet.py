"""The benchmark of halo attention runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import halonet, machine
from regard.attention.halo import HaloAttention

THEIRS = '''
"""A layer with timm's arguments."""
from regard.attention.halo import HaloAttention


class HaloAttn(HaloAttention):
    def __init__(self, dim, num_heads, block_size, halo_size):
        super().__init__(dim, heads=num_heads, block=block_size, halo=halo_size)

    def forward(self, x):
        return self.reference(x) + {off}
'''


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def theirs(folder, off=0.0):
    path = folder / "halo_attn.py"
    path.write_text(THEIRS.format(off=off))
    return str(path)


def test_every_case_is_timed_beside_the_others(tmp_path, capsys):
    assert halonet.main(["--quick", "--timm", theirs(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "8 x 8, 2 heads of 8, batch 1, forward" in printed and "14 x 14" in printed
    for column in ("timm_over_halo", "conv_over_halo", "vit_over_halo", "floor_ms", "halo_mb"):
        assert column in printed
    assert halonet.main(["--quick", "--parts", "training", "--only", "14 x 14"]) == 0
    printed = capsys.readouterr().out
    assert "training" in printed and "forward" not in printed.split("| case")[1]
    assert "timm" not in printed and "8 x 8" not in printed


def test_no_speed_is_told_where_a_result_is_wrong(tmp_path, capsys, monkeypatch):
    assert halonet.main(["--quick", "--timm", theirs(tmp_path, 1e-3)]) == 1
    assert "differs from timm's by 1.0e-03" in capsys.readouterr().err
    assert halonet.main(["--quick", "--timm", str(tmp_path / "missing.py")]) == 1
    assert "there is no file" in capsys.readouterr().err
    monkeypatch.setattr(HaloAttention, "reference", lambda layer, x: x)
    assert halonet.main(["--quick"]) == 1
    assert "differs from the definition" in capsys.readouterr().err
