"""The benchmark of attention to listed blocks runs, and tells no speed where a result is wrong."""

import pytest
import torch

from benchmarks import blocks, blocks_gpu, machine


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "floor", lambda quick: {"matmul": 1e11, "bytes": 1e10, "exp": 1e9})
    monkeypatch.setattr(machine, "THREADS", 1)
    monkeypatch.setattr(blocks, "PRODUCTS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def test_it_prints_a_row_for_each_size_and_kind(capsys):
    assert blocks.main(["--quick", "--no-flex", "--kv-heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "['grid', 256, 2, 16, 64]" in printed and "['sdpa', 256, 2]" in printed
    assert "['kinds', 512, 'gathered rows']" in printed


def test_a_block_mask_says_what_the_lists_say():
    subject = blocks.Subject.of(256, 2, 32, 128)
    whole = blocks.block_mask(subject).to_dense().bool()
    rows = whole.repeat_interleave(blocks.ROWS, 2).repeat_interleave(32, 3)
    assert torch.equal(rows, subject.mask(0, 256)) and int(rows.sum()) == blocks.HEADS * 256 * 128


def test_it_tells_no_speed_of_wrong_attention(monkeypatch, capsys):
    right = blocks.attend_blocks
    monkeypatch.setattr(blocks, "attend_blocks", lambda *x, **o: [y * 1.001 for y in right(*x, **o)])
    assert blocks.main(["--quick", "--no-flex", "--parts", "grid", "--kv-heads", "2"]) == 1
    assert "SDPA differ by" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(capsys):
    assert blocks_gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.blocks_gpu needs a CUDA GPU, and torch sees none here.\n"
