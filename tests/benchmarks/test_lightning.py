"""The benchmark of lightning attention runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import lightning, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_operator_and_decoding(capsys):
    assert lightning.main(["--quick", "--lengths", "128", "--before", "32"]) == 0
    printed = capsys.readouterr().out
    assert "operator" in printed and "decode" in printed


def test_a_state_weighs_the_same_after_more_tokens():
    short, long = (lightning.decode_row(before, 1, 1) for before in (16, 64))
    assert short["state_kib"] == long["state_kib"] < 700
    assert long["llama_cache_kib"] > 3 * short["llama_cache_kib"]


def test_it_tells_no_speed_of_a_wrong_result(monkeypatch, capsys):
    right = lightning.tiles
    monkeypatch.setattr(lightning, "tiles", lambda q, k, v: 1.001 * right(q, k, v))
    assert lightning.main(["--quick"]) == 1
    assert "tiles is off by" in capsys.readouterr().err


def test_a_missing_peer_is_named(tmp_path, capsys):
    assert lightning.main(["--quick", "--fla", str(tmp_path)]) == 1
    assert "fla-core was installed" in capsys.readouterr().err
