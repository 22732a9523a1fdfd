"""What does clipping a softmax cost? The same computation with softmax beside it, forward and training.

Eight heads of width 64 in float32, causal. `open` is the same computation with softmax, weights in the open a
block of rows at a time; `sdpa` the fused kernel, which cannot clip; `plain` the formula written in torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import ClippedSoftmax, Context
from regard.attention.clipped import clipped_attention
from regard.engines.reshaped import attend_reshaped

HEADS, WIDTH, ALPHA = 8, 64, 0.5
LENGTHS = (512, 2048)


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row a length for the forward, and one for forward and backward together."""
    _check(100)
    lengths = options.lengths or ([128] if options.quick else LENGTHS)
    rounds = options.rounds or (1 if options.quick else 7)
    return [_row(length, training, rounds) for length in lengths for training in (False, True)]


def _plain(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    weights = (q @ k.transpose(-1, -2) * WIDTH**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    gamma = -ALPHA / length
    return ((1 - gamma) * weights + gamma).clamp(0, 1) @ v


def _given(length: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


def _check(length: int) -> None:
    """Refuse an output or a gradient that is not the formula's."""
    given = [x.double().requires_grad_() for x in _given(length)]
    with torch.enable_grad():
        found, expected = (
            (*torch.autograd.grad(out.sin().sum(), given), out)
            for out in (
                clipped_attention(*(x.float() for x in given), alpha=ALPHA, length=length),
                _plain(*given, length),
            )
        )
    for one, other in zip(found, expected, strict=True):
        off = float((one - other).abs().max() / other.abs().max())
        if off > 1e-4:
            raise WrongResult(f"clipped softmax is off by {off:.1e}")


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _row(length: int, training: bool, rounds: int) -> dict[str, Any]:
    q, k, v = _given(length)
    ctx = Context.of(q, k)
    clipped = ClippedSoftmax(alpha=ALPHA, length=length).build()
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "clipped": lambda q, k, v: clipped(q, k, v, ctx),
        "open": lambda q, k, v: attend_reshaped(ctx.inputs(q, k, v), _softmax),
        "sdpa": partial(scaled_dot_product_attention, is_causal=True),
        "plain": lambda q, k, v: _plain(q, k, v, length),
    }
    times = interleaved({n: partial(_run, way, (q, k, v), training) for n, way in ways.items()}, rounds)
    low, high = times.spread("clipped", "open")
    return {
        "case": [length, "training" if training else "forward"],
        **{f"{name}_ms": 1e3 * times.median(name) for name in ways},
        "clipped_over_open": times.ratio("clipped", "open"),
        "ratios": f"{low:.2f} - {high:.2f}",
        "clipped_over_sdpa": times.ratio("clipped", "sdpa"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _run(way: Callable[..., Tensor], given: tuple[Tensor, ...], training: bool) -> None:
    if not training:
        way(*given)
        return
    with torch.enable_grad():
        fresh = [x.detach().requires_grad_() for x in given]
        way(*fresh).sum().backward()


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 512 2048)")
    return answer("clipped", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
