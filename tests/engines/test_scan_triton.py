"""The Triton kernels, in the interpreter of a process of their own, and how a backend is chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.engines import scan_triton
from regard.engines.scan import scan
from regard.errors import RegardError

CHECKS = Path(__file__).with_name("triton_checks.py")


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
    assert checks(interpret=True) >= 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_on_the_gpu():
    assert checks(interpret=False) >= 30


def given(dtype=torch.float32, width=4):
    return [torch.ones(1, 1, 3, width, dtype=dtype) for _ in range(3)]


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RegardError, match="'cuda'; it must be 'torch', 'triton' or None"):
        scan(*given(), backend="cuda")
    monkeypatch.setattr(scan_triton, "has_triton", lambda: False)
    with pytest.raises(RegardError, match="pip install triton"):
        scan(*given(), backend="triton")
    monkeypatch.setattr(scan_triton, "has_triton", lambda: True)
    with pytest.raises(RegardError, match="on cpu, and triton needs a GPU"):
        scan(*given(), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RegardError, match="are float64, float64, float64"):
        scan(*given(torch.float64), backend="triton")
    with pytest.raises(RegardError, match="257 wide"):
        scan(*given(width=257), backend="triton")
    assert scan(*given(), backend="torch")[0].flatten().tolist() == scan(*given())[0].flatten().tolist()
