"""The benchmark of whole layers runs, and tells no speed beside a peer that computes something else."""

import sys

import pytest
import torch

from benchmarks import layers, machine

PEER = """
import torch
class Attention(torch.nn.Module):
    def __init__(self, dim, heads, dim_head, causal, flash):
        super().__init__()
        made = (torch.nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.to_q, self.to_k, self.to_v, self.to_out = made
        self.heads = heads
    def forward(self, x):
        maps = (self.to_q, self.to_k, self.to_v)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in maps)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=CAUSAL)
        return self.to_out(out.transpose(1, 2).flatten(2)), None
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr("sys.path", list(sys.path))
    threads = torch.get_num_threads()
    yield
    for name in [name for name in sys.modules if name.startswith("x_transformers")]:
        sys.modules.pop(name)
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def peer(folder, causal):
    package = folder / "x_transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "x_transformers.py").write_text(PEER.replace("CAUSAL", str(causal)))
    return ["--quick", "--x-transformers", str(folder)]


def test_it_prints_a_row_for_each_direction(capsys, tmp_path):
    assert layers.main(peer(tmp_path, True)) == 0
    printed = capsys.readouterr().out
    assert "128, forward" in printed and "forward and backward" in printed and "x-transformers" in printed


def test_it_tells_no_speed_beside_other_answers(capsys, tmp_path):
    assert layers.main(peer(tmp_path, False)) == 1
    assert "differ by" in capsys.readouterr().err


def test_a_folder_without_it_is_refused(capsys, tmp_path):
    assert layers.main(["--quick", "--x-transformers", str(tmp_path)]) == 1
    assert "cannot be imported" in capsys.readouterr().err
