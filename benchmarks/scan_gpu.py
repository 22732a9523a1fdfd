"""How fast is the recurrence on a GPU: against flash-linear-attention's Lightning kernel and SDPA's flash?

Bfloat16, 16 heads of width 128, one sequence of 2,048 to 131,072 tokens; forward, and forward with backward.
Bytes are what inputs, outputs and their gradients take once; operations are 8 T D^2 H, and backward 2.5 times
that. Rates are those measured on the same card in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from regard.engines.scan import scan

HEADS, WIDTH = 16, 128
LENGTHS = [2048, 8192, 32768, 131072]


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length."""
    _check()
    rounds = options.rounds or (3 if options.quick else 20)
    multiply, move = rates(rounds)
    lengths = options.lengths or (LENGTHS[:1] if options.quick else LENGTHS)
    return [_row(length, rounds, multiply, move) for length in lengths]


def _decay() -> Tensor:
    """The rates that flash-linear-attention gives the first layer of two."""
    return -(8 / HEADS * (1 - 0 / 2)) * torch.arange(HEADS, device="cuda", dtype=torch.float32)


def _inputs(length: int) -> list[Tensor]:
    made = (torch.randn(1, HEADS, length, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return [x.requires_grad_() for x in made]


def _check() -> None:
    given = _inputs(1000)
    wide = [x.detach().double().requires_grad_() for x in given]
    with torch.enable_grad():
        out, exact = scan(*given, _decay(), backend="triton")[0], scan(*wide, _decay(), backend="torch")[0]
        found, expected = (torch.autograd.grad((o * o).sum(), x) for o, x in ((out, given), (exact, wide)))
    for one, other in zip((out, *found), (exact, *expected), strict=True):
        off = float((one - other).abs().max() / other.abs().max())
        if not off < 0.03:
            raise WrongResult(f"the kernels are off by {off:.1e}")


def _row(length: int, rounds: int, multiply: float, move: float) -> dict[str, Any]:
    q, k, v = _inputs(length)
    by_time = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    decay = _decay()

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    cases: dict[str, Callable[[], Tensor]] = {
        "scan": lambda: scan(q, k, v, decay, backend="triton")[0],
        "flash": flash,
    }
    lightning = _lightning()
    if lightning is not None:
        cases["fla"] = lambda: lightning(*by_time, layer_idx=0, num_layers=2, scale=1.0)[0]
    row: dict[str, Any] = {"case": length, "gpu": torch.cuda.get_device_name()}
    for name, work in cases.items():
        with torch.no_grad():
            row[f"{name}_ms"] = 1e3 * seconds(work, rounds)
        row[f"{name}_both_ms"] = 1e3 * seconds(lambda work=work: both(work), rounds)
    operations, numbers = 8 * length * WIDTH**2 * HEADS, length * WIDTH * HEADS
    row["of_rate"] = operations / (1e-3 * row["scan_ms"]) / multiply
    row["of_bytes"] = (3 * 2 + 4) * numbers / (1e-3 * row["scan_ms"]) / move
    row["both_of_rate"] = 3.5 * operations / (1e-3 * row["scan_both_ms"]) / multiply
    for name in cases:
        row[f"{name}_over_scan"] = row[f"{name}_ms"] / row["scan_ms"]
        row[f"{name}_over_scan_both"] = row[f"{name}_both_ms"] / row["scan_both_ms"]
    return row


def both(work: Callable[[], Tensor]) -> None:
    with torch.enable_grad():
        out = work()
        out.backward(torch.ones_like(out))


def _lightning() -> Any:
    try:
        from fla.ops.lightning_attn import chunk_lightning_attn
    except ImportError as missing:
        print(f"without flash-linear-attention: {missing}", file=sys.stderr)
        return None
    return chunk_lightning_attn


def rates(rounds: int) -> tuple[float, float]:
    """Bfloat16 operations, and bytes, a second."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    products = 2 * 8192**3 / seconds(lambda: a @ a, rounds)
    return products, 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), rounds)


def seconds(work: Callable[[], Any], rounds: int) -> float:
    for _ in range(3):
        work()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong, 2 without a GPU."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens (default: 2048 8192 32768 131072)")
    given = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.scan_gpu needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    return answer("scan_gpu", given, ask)


if __name__ == "__main__":
    sys.exit(main())
