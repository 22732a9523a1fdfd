"""How fast is the recurrence: against the machine's matrix rate, causal SDPA, and flash-linear-attention?

Eight heads of width 64, batch 1. Operations are counted as 8 T D^2 H, whatever the chunk, and the rate of
matrix products is measured in the same rounds. `--fla FOLDER` is where flash-linear-attention's package `fla`
stands, unpacked; of it only the two `naive.py` files are loaded, with einops, which they need.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import Times, interleaved
from regard.engines import near
from regard.engines.scan import scan

HEADS, WIDTH = 8, 64
KINDS = ("none", "head", "step", "channel")
PRODUCTS = 16
Cases = dict[str, Callable[[], Any]]


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a case."""
    for kind in KINDS:
        _check(kind)
    rounds = options.rounds or (1 if options.quick else 5)
    short, length, long = (128, 256, 512) if options.quick else (4096, 16384, 65536)
    rows = []
    if "kinds" in options.parts:
        rows += _kinds(length, rounds)
    if "lengths" in options.parts:
        rows += _lengths([short, length, long], rounds)
    if "peers" in options.parts and options.fla is not None:
        rows += _peers(options.fla, length, min(length, 1024), rounds)
    return rows


def _decay(kind: str, length: int) -> Tensor | None:
    """No decay, the slopes 1/2 to 1/256 of Lightning Attention, or random ones."""
    if kind == "head":
        return -(2.0 ** -torch.arange(1, HEADS + 1))
    shape = {"step": (1, HEADS, length), "channel": (1, HEADS, length, WIDTH)}
    return None if kind == "none" else -0.1 * torch.rand(shape[kind])


def _inputs(length: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


@contextmanager
def safe() -> Iterator[None]:
    """Never factor exponents, as if every chunk decayed too much for it."""
    reach, near.REACH = near.REACH, -1.0
    try:
        yield
    finally:
        near.REACH = reach


def _safely(*given: Tensor | None) -> tuple[Tensor, Tensor]:
    with safe():
        return scan(*given)  # type: ignore[arg-type]


def _check(kind: str) -> None:
    q, k, v = _inputs(100)
    decay, state = _decay(kind, 100), torch.zeros(1, HEADS, WIDTH, WIDTH, dtype=torch.float64)
    half = scan(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay)[0]
    ways = {"factored": (scan(q, k, v, decay)[0], 1e-5), "safe": (_safely(q, k, v, decay)[0], 1e-5)}
    ways["bfloat16"] = (half, 0.03)
    expected = []
    for i in range(100):
        if decay is not None:
            step = decay.view(1, -1, 1) if kind == "head" else decay[:, :, i].view(1, HEADS, -1)
            state = state * step.double().exp()[..., None]
        state = state + k[:, :, i, :, None].double() * v[:, :, i, None].double()
        expected.append((q[:, :, i, None].double() @ state)[:, :, 0])
    exact = torch.stack(expected, 2)
    for name, (found, bound) in ways.items():
        off = float((found - exact).abs().max() / exact.abs().max())
        if not off < bound:
            raise WrongResult(f"scan ({name}) with decay {kind} is off by {off:.1e}")


def _kinds(length: int, rounds: int) -> list[dict[str, Any]]:
    q, k, v = _inputs(length)
    half = [x.bfloat16() for x in (q, k, v)]
    head, step, channel = (_decay(kind, length) for kind in KINDS[1:])
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    into = torch.randn(1, HEADS, length, WIDTH)

    def trained(*decay: Tensor | None) -> None:
        with torch.enable_grad():
            scan(*given, *decay)[0].backward(into)

    cases = {
        "none": lambda: scan(q, k, v),
        "head": lambda: scan(q, k, v, head),
        "step": lambda: scan(q, k, v, step),
        "channel, factored": lambda: scan(q, k, v, channel),
        "channel, safe": lambda: _safely(q, k, v, channel),
        "head, bfloat16": lambda: scan(*half, head),
        "head, forward and backward": lambda: trained(head),
        "causal SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    times = _timed(cases, rounds)
    rows = {name: _row(length, name, times) for name in cases}
    told = [
        ("head", "causal SDPA over it", times.ratio("causal SDPA", "head"), "at least 30"),
        ("head, bfloat16", "head over it", times.ratio("head", "head, bfloat16"), "at least 2"),
        (
            "head, forward and backward",
            "backward over forward",
            times.ratio("head, forward and backward", "head") - 1,
            "at most 3",
        ),
        ("channel, safe", "over none", times.ratio("channel, safe", "none"), "at most 4"),
        ("channel, factored", "over none", times.ratio("channel, factored", "none"), "below safe"),
    ]
    for name, what, ratio, aim in told:
        rows[name] |= {"ratio": ratio, "of": what, "aim": aim}
    return list(rows.values())


def _lengths(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    head = _decay("head", 0)
    cases = {}
    for length in lengths:
        given = _inputs(length)
        cases[f"head, {length}"] = lambda given=given: scan(*given, head)
    times = _timed(cases, rounds)
    rows = [_row(length, f"head, {length}", times) for length in lengths]
    first, last = f"head, {lengths[0]}", f"head, {lengths[-1]}"
    speed = statistics.median(
        (a / lengths[0]) / (b / lengths[-1])
        for a, b in zip(times.seconds[first], times.seconds[last], strict=True)
    )
    rows[-1] |= {"ratio": speed, "of": f"tokens/s over those at {lengths[0]}", "aim": "at least 0.85"}
    return rows


def _peers(folder: Path, length: int, short: int, rounds: int) -> list[dict[str, Any]]:
    simple, gla = (_load(folder / "ops" / name / "naive.py") for name in ("simple_gla", "gla"))
    head, rows = _decay("head", 0), []
    for size, case in ((length, "head"), (short, "channel")):
        q, k, v = _inputs(size)
        decay = _decay(case, size)
        by_time = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        if case == "head":
            g = head.expand(1, size, HEADS).contiguous()
            name, peer = "fla naive_chunk_simple_gla", simple.naive_chunk_simple_gla
            options = {"scale": 1.0}
        else:
            g = decay.transpose(1, 2).contiguous()
            name, peer, options = "fla naive_recurrent_gla", gla.naive_recurrent_gla, {}
        factor = 1.0 if case == "head" else WIDTH**-0.5
        off = (peer(*by_time, g, **options)[0].transpose(1, 2) - factor * scan(q, k, v, decay)[0]).abs().max()
        if off > 1e-3:
            raise WrongResult(f"{name} and scan differ by {off:.1e}")
        ours = f"scan, {case}, {size}"
        cases = {ours: lambda q=q, k=k, v=v, d=decay: scan(q, k, v, d)}
        cases[name] = lambda peer=peer, x=by_time, g=g, o=options: peer(*x, g, **o)
        times = _timed(cases, rounds)
        found = _row(size, name, times)
        rows += [_row(size, ours, times), found]
        found |= {"ratio": times.ratio(name, ours), "of": "over scan"}
        found["off"] = float(off)
    return rows


def _load(path: Path) -> Any:
    if not path.is_file():
        raise SystemExit(f"--fla: there is no {path}; it must be the folder `fla` of the unpacked package.")
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _timed(cases: Cases, rounds: int) -> Times:
    """Time the cases with matrix products beside them."""
    a, b, out = torch.randn(2048, 576), torch.randn(576, 1536), torch.empty(2048, 1536)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return interleaved({"products": products, **cases}, rounds)


def _row(length: int, name: str, times: Times) -> dict[str, Any]:
    operations = 8 * length * WIDTH**2 * HEADS
    share = times.ratio("products", name) * operations / (2 * 2048 * 576 * 1536 * PRODUCTS)
    row = {
        "case": [length, name],
        "ms": 1e3 * times.median(name),
        "tokens_per_s": length / times.median(name),
    }
    if "SDPA" not in name and "backward" not in name:
        row |= {"gflops": operations / times.median(name) / 1e9, "of_rate": share}
    low, high = min(times.seconds[name]), max(times.seconds[name])
    return row | {
        "least_ms": 1e3 * low,
        "most_ms": 1e3 * high,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    parts = ["kinds", "lengths", "peers"]
    options.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, help="what to ask (default: all)"
    )
    options.add_argument(
        "--fla", type=Path, metavar="FOLDER", help="flash-linear-attention's package, unpacked"
    )
    return answer("scan", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
