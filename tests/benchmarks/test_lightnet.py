"""The benchmark of LightNet runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import lightnet, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_question(capsys):
    assert lightnet.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "[256]" in printed and "decode" in printed and "keys x 80" in printed


@pytest.mark.parametrize("method", ["chunk", "safe"])
def test_it_tells_no_speed_of_a_wrong_form(method, monkeypatch, capsys):
    right = lightnet.lightnet_attention

    def wrong(*given, **options):
        out, state = right(*given, **options)
        return out * (1.001 if options.get("method") == method else 1), state

    monkeypatch.setattr(lightnet, "lightnet_attention", wrong)
    assert lightnet.main(["--quick"]) == 1
    assert f"({method}, keys x 1) is off by" in capsys.readouterr().err
