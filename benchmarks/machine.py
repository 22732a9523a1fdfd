"""The machine, the versions, and the floor: how fast it multiplies matrices and moves bytes."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

THREADS, SEED = 2, 0
CPU_PRESSURE = Path("/proc/pressure/cpu")


def settle() -> None:
    """Use the threads and the seed that every figure is taken with."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    torch.set_grad_enabled(False)


def about() -> dict[str, Any]:
    """Return the hardware and the versions, as JSON values."""
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(_memory() / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "seed": SEED,
    }


def floor(quick: bool = False) -> dict[str, float]:
    """Measure the rates that bound every time below.

    Returns:
        `matmul`, float32 operations a second of [2048, 576] @ [576, 1536]; `bytes`, bytes a second that a
        copy of 256 MB reads and writes; `exp`, exponentials a second, 512 KB at a time.
    """
    size = 16 if quick else 256
    a, b, out = torch.randn(2048, 576), torch.randn(576, 1536), torch.empty(2048, 1536)
    source = torch.randn(size * 2**18)
    target, small = torch.empty_like(source), torch.randn(2**17)
    kept = torch.empty_like(small)
    return {
        "matmul": 2 * 2048 * 576 * 1536 / _seconds(lambda: torch.mm(a, b, out=out)),
        "bytes": 2 * 4 * source.numel() / _seconds(lambda: target.copy_(source)),
        "exp": small.numel() / _seconds(lambda: torch.exp(small, out=kept)),
    }


def waited() -> float:
    """Return for how many seconds some process has waited for a processor, all told; 0 where unknown."""
    try:
        line = CPU_PRESSURE.read_text().splitlines()[0]
    except OSError:
        return 0.0
    return int(line.rpartition("total=")[2]) / 1e6


def _seconds(work: Callable[[], Any], times: int = 9) -> float:
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _memory() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
