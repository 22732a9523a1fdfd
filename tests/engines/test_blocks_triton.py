"""The Triton kernels of listed blocks, in the interpreter of their own process; how a backend is chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.engines import scan_triton
from regard.engines.blocks import attend_blocks
from regard.errors import RegardError

CHECKS = Path(__file__).with_name("blocks_triton_checks.py")


def checks(interpret):
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpret else dict(os.environ)
    if interpret:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    assert checks(interpret=True) >= 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_on_the_gpu():
    assert checks(interpret=False) >= 24


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    def call(dtype=torch.float32, width=4, **options):
        x = torch.ones(1, 1, 3, width, dtype=dtype)
        return attend_blocks(x, x, x, torch.zeros(1, 1, 3, 1, dtype=torch.int64), **options)[0]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RegardError, match="'cuda'; it must be 'torch', 'triton' or None"):
        call(backend="cuda")
    monkeypatch.setattr(scan_triton, "has_triton", lambda: False)
    with pytest.raises(RegardError, match="pip install triton"):
        call(backend="triton")
    monkeypatch.setattr(scan_triton, "has_triton", lambda: True)
    with pytest.raises(RegardError, match="on cpu, and triton needs a GPU"):
        call(backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RegardError, match="are float64, float64, float64"):
        call(torch.float64, backend="triton")
    with pytest.raises(RegardError, match="257 wide"):
        call(width=257, backend="triton")
    assert torch.equal(call(backend="torch"), call())
