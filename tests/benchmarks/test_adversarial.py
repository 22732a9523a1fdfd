"""The benchmark of adversarial attention runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import adversarial, machine
from regard.objectives.adversarial import loss


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_model(capsys):
    assert adversarial.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "['bilstm', 8]" in printed and "['encoder', 8]" in printed and "vat_over_plain" in printed


def test_a_wrong_gradient_is_told_and_no_speed(monkeypatch, capsys):
    right = loss.AdversarialLoss._labelled

    def wrong(self, *given):
        value, told = right(self, *given)
        return 1.01 * value, told

    monkeypatch.setattr(loss.AdversarialLoss, "_labelled", wrong)
    assert adversarial.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "bilstm, at is off by" in shown.err and "plain_ms" not in shown.out
