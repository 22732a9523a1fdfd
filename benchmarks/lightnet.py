"""How far is LightNet from the plain recurrence: without decays, with them, keys x 80, both ways, decoding?

Eight heads of width 64 in float32. The peer is flash-linear-attention's own function for a CPU, a loop over
positions; it is timed at 1,024 positions alone, and only where `fla` can be imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention.lightnet import lightnet_attention
from regard.engines.scan import scan

HEADS, WIDTH = 8, 64
SHORT = 1024
Case = Callable[[], Any]


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row a length and one for decoding."""
    for keys in (1, 10, 80):
        _check(keys)
    lengths = options.lengths or ([256] if options.quick else [4096, 16384])
    rounds = options.rounds or (1 if options.quick else 5)
    rows = [_whole(length, rounds) for length in lengths]
    rows.append(_decoding(*((64, 256) if options.quick else (1024, 65536)), rounds))
    peer = _peer(64 if options.quick else SHORT, rounds)
    return rows if peer is None else [*rows, peer]


def _given(length: int, keys: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, HEADS, length, WIDTH) for _ in range(3))
    return q, keys * k, v


def _check(keys: int) -> None:
    """Hold both forms to the sum as written, in float64, over several pieces."""
    q, k, v = _given(300, keys)
    for method in ("chunk", "safe"):
        found, _ = lightnet_attention(q, k, v, causal=True, method=method)
        for t in range(0, 300, 13):
            weights = k[:, :, : t + 1].double().softmax(2)
            expected = (q[:, :, t, None].double() @ weights.transpose(-1, -2) @ v[:, :, : t + 1].double())[
                :, :, 0
            ]
            off = float((found[:, :, t] - expected).abs().max() / expected.abs().max().clamp(min=1))
            if not off < 1e-4:
                raise WrongResult(f"LightNet ({method}, keys x {keys}) is off by {off:.1e} at position {t}")


def _whole(length: int, rounds: int) -> dict[str, Any]:
    q, k, v = _given(length)
    wide = 80 * k
    given = [x.clone().requires_grad_() for x in (q, k, v)]

    def both() -> None:
        with torch.enable_grad():
            lightnet_attention(*given, causal=True)[0].sum().backward()

    cases: dict[str, Case] = {
        "scan": lambda: scan(q, k, v),
        "chunk": lambda: lightnet_attention(q, k, v, causal=True),
        "safe": lambda: lightnet_attention(q, k, v, causal=True, method="safe"),
        "keys x 80": lambda: lightnet_attention(q, wide, v, causal=True),
        "all directions": lambda: lightnet_attention(q, k, v, causal=False),
        "both": both,
    }
    times = interleaved(cases, rounds)
    ratios = {name: times.ratio(name, "scan") for name in cases if name not in ("scan", "both")}
    return {
        "case": [length],
        "scan_ms": 1e3 * times.median("scan"),
        **ratios,
        "backward_over_forward": times.ratio("both", "chunk") - 1,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _decoding(short: int, long: int, rounds: int) -> dict[str, Any]:
    """The time of 50 tokens, one by one, after a short and a long past."""
    q, k, v = _given(50)

    def after(past: int) -> Case:
        _, state = lightnet_attention(*_given(past), causal=True)

        def decode() -> None:
            now = state
            for t in range(50):
                one = (x[:, :, t : t + 1] for x in (q, k, v))
                _, now = lightnet_attention(*one, causal=True, state=now)

        return decode

    times = interleaved({"short": after(short), "long": after(long)}, rounds)
    return {
        "case": ["decode", short, long],
        "token_ms": 1e3 * times.median("short") / 50,
        "long_over_short": times.ratio("long", "short"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _peer(length: int, rounds: int) -> dict[str, Any] | None:
    try:
        import fla
        from fla.ops.gla.naive import naive_recurrent_gla
    except ImportError:
        print("flash-linear-attention is not installed, so it is not timed", file=sys.stderr)
        return None
    q, k, v = _given(length)

    def theirs() -> Tensor:
        z = k.logcumsumexp(2)
        decay = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1] - z[:, :, 1:]], 2)
        given = (x.transpose(1, 2) for x in (q * WIDTH**0.5, (k - z).exp(), v, decay))
        out: Tensor = naive_recurrent_gla(*given)[0].transpose(1, 2)
        return out

    ours, _ = lightnet_attention(q, k, v, causal=True)
    off = float((ours - theirs()).abs().max() / ours.abs().max())
    if not off < 1e-4:
        raise WrongResult(f"flash-linear-attention and LightNet differ by {off:.1e}")
    cases: dict[str, Case] = {"ours": lambda: lightnet_attention(q, k, v, causal=True), "theirs": theirs}
    times = interleaved(cases, rounds)
    return {
        "case": [f"fla {fla.__version__}", length],
        "chunk_ms": 1e3 * times.median("ours"),
        "theirs_over_chunk": times.ratio("theirs", "ours"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 4096 16384)")
    return answer("lightnet", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
