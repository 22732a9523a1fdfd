"""How much longer do softplus and re-weighting take than a softmax in the same computation?

Eight heads of width 64 in float32, causal, by blocks of rows with the scores open; SDPA is set beside them.
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
from regard.attention import LSSA, LSSAR, Context
from regard.engines.reshaped import attend_reshaped

HEADS, WIDTH = 8, 64
SPECS = {"lssa": LSSA(), "lssar_3": LSSAR(p_train=3.0, p_eval=3.0), "lssar_15": LSSAR()}


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length."""
    _check()
    lengths = options.lengths or ([256] if options.quick else [1024, 4096])
    rounds = options.rounds or (1 if options.quick else 5)
    return [_row(length, rounds) for length in lengths]


def _inputs(length: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


def _check() -> None:
    q, k, v = _inputs(200)
    for name, spec in SPECS.items():
        attention = spec.build()
        expected = attention.reference(q.double(), k.double(), v.double())
        off = (attention(q, k, v) - expected).abs().max() / expected.abs().max()
        if off > 1e-4:
            raise WrongResult(f"{name} is off by {off:.1e}")


def _row(length: int, rounds: int) -> dict[str, Any]:
    q, k, v = _inputs(length)
    inputs = Context.of(q, k).inputs(q, k, v)
    built = {name: spec.build() for name, spec in SPECS.items()}
    given = [x.clone().requires_grad_() for x in (q, k, v)]

    def softmax(scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def trained(work: Any) -> None:
        with torch.enable_grad():
            work(*given).sum().backward()

    cases = {
        "softmax": lambda: attend_reshaped(inputs, softmax),
        **{name: (lambda attention=attention: attention(q, k, v)) for name, attention in built.items()},
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "softmax_both": lambda: trained(
            lambda a, b, c: attend_reshaped(Context.of(a, b).inputs(a, b, c), softmax)
        ),
        "lssar_both": lambda: trained(built["lssar_15"]),
    }
    times = interleaved(cases, rounds)
    return {
        "case": [length],
        "softmax_ms": 1e3 * times.median("softmax"),
        **{f"{name}_over_softmax": times.ratio(name, "softmax") for name in SPECS},
        "trained_over_softmax": times.ratio("lssar_both", "softmax_both"),
        "softmax_over_sdpa": times.ratio("softmax", "sdpa"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 1024 4096)")
    return answer("softplus", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
