"""How much longer does Flow-Attention take than the recurrence it is made of, and does decoding slow down?

Eight heads of width 64 in float32. The last rows decode one position after so many others.
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
from regard.attention import Context, FlowAttention
from regard.attention.flow import flow_attention
from regard.engines.scan import scan

HEADS, WIDTH = 8, 64
STEPS = 32


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length, and one a number of positions before a decoded one."""
    _check()
    lengths = options.lengths or ([256] if options.quick else [1024, 4096, 16384])
    rounds = options.rounds or (1 if options.quick else 5)
    return [*(_row(n, rounds) for n in lengths), *_decoded(lengths, rounds)]


def _inputs(length: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


def _check() -> None:
    q, k, v = _inputs(300)
    exact = [x.double() for x in (q, k, v)]
    for causal in (True, False):
        expected = flow_attention(*exact, causal=causal, method="naive")
        off = (flow_attention(q, k, v, causal=causal) - expected).abs().max() / expected.abs().max()
        if off > 1e-5:
            raise WrongResult(f"flow attention, causal={causal}, is off by {off:.1e}")
    stepped = flow_attention(*exact, causal=True, method="recurrent")
    off = (stepped - flow_attention(*exact, causal=True)).abs().max()
    if off > 1e-9:
        raise WrongResult(f"flow attention in steps is off by {off:.1e}")


def _row(length: int, rounds: int) -> dict[str, Any]:
    q, k, v = _inputs(length)
    flow, full = FlowAttention().build(), Context.of(q, k, causal=False)
    given = [x.clone().requires_grad_() for x in (q, k, v)]

    def both() -> None:
        with torch.enable_grad():
            flow(*given).sum().backward()

    cases = {
        "scan": lambda: scan(q, k, v),
        "flow": lambda: flow(q, k, v),
        "full": lambda: flow(q, k, v, full),
        "both": both,
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    times = interleaved(cases, rounds)
    return {
        "case": ["whole", length],
        "scan_ms": 1e3 * times.median("scan"),
        "flow_ms": 1e3 * times.median("flow"),
        "flow_over_scan": times.ratio("flow", "scan"),
        "full_over_scan": times.ratio("full", "scan"),
        "backward_over_forward": times.ratio("both", "flow") - 1,
        "flow_us_a_token": 1e6 * times.median("flow") / length,
        "sdpa_us_a_token": 1e6 * times.median("sdpa") / length,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _decoded(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Decoding after so many positions; all in turns, so that a ratio is of the same moment."""
    flow = FlowAttention().build()
    states = {n: flow.step(*_inputs(n), None)[1] for n in lengths}
    q, k, v = _inputs(1)

    def decode(state: Any) -> None:
        for _ in range(STEPS):
            _, state = flow.step(q, k, v, state)

    cases = {str(n): (lambda state=state: decode(state)) for n, state in states.items()}
    times = interleaved(cases, rounds)
    first = str(lengths[0])
    return [
        {
            "case": ["step", n],
            "step_us": 1e6 * times.median(str(n)) / STEPS,
            "step_over_first": times.ratio(str(n), first),
            "state_kb": sum(x.numel() * x.element_size() for x in states[n]) / 1024,
            "rounds": rounds,
            "dropped": times.dropped,
            "times": times.as_json(),
        }
        for n in lengths
    ]


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 1024 4096 16384)")
    return answer("flow", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
