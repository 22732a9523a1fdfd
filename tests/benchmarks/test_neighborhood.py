"""The benchmark of neighbourhood attention runs, and tells no speed where a result is wrong."""

import types

import pytest
import torch

from benchmarks import machine, neighborhood, neighborhood_gpu
from regard.attention.neighborhood.function import attend_grid
from regard.attention.neighborhood.rules import axes_of


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """FlexAttention is not compiled, which takes longer than all tests here."""
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    monkeypatch.setattr(neighborhood, "compiled_flex", lambda: flex)
    monkeypatch.setattr(neighborhood, "block_mask", lambda axes, device: axes)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def flex(q, k, v, block_mask):
    grid = [axis.length for axis in block_mask]
    given = [x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v)]
    out, _ = attend_grid(*given, block_mask, scale=q.shape[-1] ** -0.5, impl="dense")
    return out.flatten(1, -3).transpose(1, 2)


def stub(factor):
    """What stands in for natten: the definition, times a factor."""

    def attend(q, k, v, backend, **options):
        axes = axes_of(q.shape[1:-2], **options)
        return factor * attend_grid(q, k, v, axes, scale=q.shape[-1] ** -0.5, impl="dense")[0]

    return types.SimpleNamespace(__version__="0", na1d=attend, na2d=attend, na3d=attend)


def test_it_prints_a_row_for_each_grid(monkeypatch, capsys):
    monkeypatch.setattr(neighborhood, "natten_or_none", lambda: stub(1.0))
    assert neighborhood.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*neighborhood.SMALL, "natten 0", "backward_over_near"))


def test_only_what_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(neighborhood, "natten_or_none", lambda: None)
    assert neighborhood.main(["--quick", "--only", "volume"]) == 0
    printed = capsys.readouterr().out
    assert "volume 6" in printed and "plane" not in printed and "natten" not in printed


@pytest.mark.parametrize("whose", ["natten", "the definition", "flex"])
def test_it_tells_no_speed_of_a_wrong_result(whose, monkeypatch, capsys):
    monkeypatch.setattr(neighborhood, "natten_or_none", lambda: stub(1.001) if whose == "natten" else None)
    if whose == "the definition":
        wrong = {n: lambda *x, way=way, **o: way(*x, **o) * (1 if o.get("impl") else 1.001)
                 for n, way in neighborhood.ATTEND.items()}  # fmt: skip
        monkeypatch.setattr(neighborhood, "ATTEND", wrong)
    if whose == "flex":
        monkeypatch.setattr(neighborhood, "compiled_flex", lambda: lambda *x, **o: 1.001 * flex(*x, **o))
    assert neighborhood.main(["--quick"]) == 1
    assert f"differs from {whose}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(capsys):
    assert neighborhood_gpu.main([]) == 2
    told = "benchmarks.neighborhood_gpu needs a CUDA GPU, and torch sees none here.\n"
    assert capsys.readouterr().err == told
