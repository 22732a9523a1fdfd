"""The benchmarks of Flow-Attention and softplus attention run, and tell no speed where a result is wrong."""

import pytest
import torch

from benchmarks import flow, machine, softplus


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("module", "told"), [(flow, ("flow_over_scan", "state_kb")), (softplus, ("lssar_15_over_softmax",))]
)
def test_it_prints_its_rows(module, told, capsys):
    assert module.main(["--quick", "--lengths", "64"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in told) and "64]" in printed


def test_it_tells_no_speed_of_a_wrong_result(monkeypatch, capsys):
    right = flow.flow_attention
    monkeypatch.setattr(flow, "flow_attention", lambda *x, **options: (
        right(*x, **options) * (1 if "method" in options else 1.001)))  # fmt: skip
    assert flow.main(["--quick"]) == 1
    monkeypatch.setitem(softplus.SPECS, "lssa", type("Wrong", (), {"build": lambda self: Wrong()})())
    assert softplus.main(["--quick"]) == 1
    assert capsys.readouterr().err.count("off by") == 2


class Wrong(torch.nn.Module):
    """Off by a thousandth."""

    def reference(self, q, k, v):
        return v

    def forward(self, q, k, v):
        return 1.001 * v
