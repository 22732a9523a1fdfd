"""Times and memory, for studies of cost: every case once a round, so that a busy machine slows all alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Work = Callable[[], Any]


def in_rounds(cases: Mapping[str, Work], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Return the seconds of every case in every round, after `warm` rounds that do not count."""
    for _ in range(warm):
        for work in cases.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(work: Work) -> int:
    """Return the most memory that torch held on the CPU while `work` ran, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    inner = profiler.profiler
    assert inner is not None and inner.kineto_results is not None
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what the profiler's own library writes to standard error off the terminal."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
