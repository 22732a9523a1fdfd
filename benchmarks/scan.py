"""How near is the recurrence to the machine's rate of multiplying matrices, and how far from causal SDPA?

Eight heads of width 64 in float32. Operations are counted as 8 T D^2 H, whatever the chunk.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.engines.scan import scan

HEADS, WIDTH = 8, 64
KINDS = ("none", "head", "step", "channel")


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length and kind of decay."""
    for kind in KINDS:
        _check(kind)
    lengths = options.lengths or ([256] if options.quick else [4096, 16384])
    rounds = options.rounds or (1 if options.quick else 5)
    return [_row(length, kind, rounds, floor) for length in lengths for kind in KINDS]


def _decay(kind: str, length: int) -> Tensor | None:
    shape = {"head": (HEADS,), "step": (1, HEADS, length), "channel": (1, HEADS, length, WIDTH)}
    return None if kind == "none" else -0.1 * torch.rand(shape[kind])


def _check(kind: str) -> None:
    q, k, v = (torch.randn(1, HEADS, 100, WIDTH) for _ in range(3))
    decay, state = _decay(kind, 100), torch.zeros(1, HEADS, WIDTH, WIDTH, dtype=torch.float64)
    out, _ = scan(q, k, v, decay)
    for i in range(100):
        if decay is not None:
            step = decay.view(1, -1, 1) if kind == "head" else decay[:, :, i].view(1, HEADS, -1)
            state = state * step.double().exp()[..., None]
        state = state + k[:, :, i, :, None].double() * v[:, :, i, None].double()
        expected = (q[:, :, i, None].double() @ state)[:, :, 0]
        off = (out[:, :, i] - expected).abs().max() / expected.abs().max()
        if off > 1e-5:
            raise WrongResult(f"scan with decay {kind} is off by {off:.1e} at position {i}")


def _row(length: int, kind: str, rounds: int, floor: dict[str, float]) -> dict[str, Any]:
    q, k, v = (torch.randn(1, HEADS, length, WIDTH) for _ in range(3))
    decay = _decay(kind, length)
    given = [x.clone().requires_grad_() for x in (q, k, v)]

    def both() -> None:
        with torch.enable_grad():
            scan(*given, decay)[0].sum().backward()

    cases = {
        "scan": lambda: scan(q, k, v, decay),
        "both": both,
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    times = interleaved(cases, rounds)
    rate = 8 * length * WIDTH**2 * HEADS / times.median("scan")
    return {
        "case": [length, kind],
        "scan_ms": 1e3 * times.median("scan"),
        "gflops": rate / 1e9,
        "of_floor": rate / floor["matmul"],
        "sdpa_over_scan": times.ratio("sdpa", "scan"),
        "backward_over_forward": times.ratio("both", "scan") - 1,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 4096 16384)")
    return answer("scan", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
