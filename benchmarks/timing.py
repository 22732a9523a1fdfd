"""Times of several ways to do one thing, taken in turns: A B C A B C ..."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import waited

DISTURBED = 0.10


@dataclass(frozen=True)
class Times:
    """Seconds of each case, one number a round.

    Attributes:
        seconds: case -> seconds, in the order of the rounds kept.
        dropped: how many rounds were left out, because other processes took the processor.
    """

    seconds: Mapping[str, list[float]]
    dropped: int = 0

    def median(self, case: str) -> float:
        """Return the median seconds of a case."""
        return statistics.median(self.seconds[case])

    def ratio(self, case: str, base: str) -> float:
        """Return the median over rounds of the time of `case` over that of `base`."""
        pairs = zip(self.seconds[case], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def spread(self, case: str, base: str) -> tuple[float, float]:
        """Return the smallest and largest of those ratios."""
        pairs = zip(self.seconds[case], self.seconds[base], strict=True)
        ratios = [a / b for a, b in pairs]
        return min(ratios), max(ratios)

    def as_json(self) -> dict[str, Any]:
        """Return all seconds, rounded, as JSON values."""
        kept = {case: [round(s, 5) for s in found] for case, found in self.seconds.items()}
        return {"seconds": kept, "dropped": self.dropped}


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int, extra: int | None = None, warm: int = 1
) -> Times:
    """Time every case once a round, after `warm` rounds that do not count.

    A round in which other processes kept somebody waiting for a processor for more than a tenth of it is
    left out and repeated, at most `extra` times (default as many as `rounds`); after that all rounds count.

    Args:
        cases: name -> what to run; either it is timed from outside, or it returns its own seconds as float.
        rounds: how many to keep.
    """
    for _ in range(warm):
        for work in cases.values():
            work()
    kept: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    most = rounds + (rounds if extra is None else extra)
    while len(kept) < rounds and len(kept) + len(disturbed) < most:
        before, start = waited(), time.perf_counter()
        found = {name: _once(work) for name, work in cases.items()}
        share = (waited() - before) / (time.perf_counter() - start)
        (disturbed if share > DISTURBED else kept).append(found)
    short = rounds - len(kept)
    kept += disturbed[len(disturbed) - short :] if short else []
    dropped = len(disturbed) - short
    return Times({name: [found[name] for found in kept] for name in cases}, dropped)


def _once(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    told = work()
    return told if isinstance(told, float) else time.perf_counter() - start
