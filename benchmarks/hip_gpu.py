"""How fast is HiP on a GPU, and how much memory does it take, beside SDPA's flash attention?

Heads of Llama 3.1 8B (32 query heads, 8 key heads, width 128) in bfloat16, one sequence of 8,192 to 131,072
tokens: a whole prompt, and the mean of 8 decoded tokens that one search serves. `memory` is what a call takes
at its highest beside its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from regard.attention import Context, HiP, hip_attention, hip_mask

HEADS, KV_HEADS, WIDTH = 32, 8, 128
LENGTHS = [8192, 16384, 32768, 65536, 131072]
SPEC = HiP()


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return a row a length for a prompt, and one for decoding."""
    _check()
    rounds = options.rounds or (2 if options.quick else 5)
    lengths = options.lengths or (LENGTHS[:1] if options.quick else LENGTHS)
    return [work(n, rounds) for n in lengths for work in (_prompt, _decode)]


def _heads(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)
    q, k, v = (torch.randn(1, h, n, WIDTH, device="cuda", dtype=torch.bfloat16) for h, n in shapes)
    return q, k, v


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def _check() -> None:
    """Refuse attention that is not softmax over the keys that the search has found."""
    for queries in (2000, 1):
        q, k, v = _heads(queries, 2000)
        seen = hip_mask(q, k, SPEC).to_dense()
        wide = [x.double() for x in (q, k, v)]
        exact = scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)
        off = float((hip_attention(q, k, v, SPEC) - exact).abs().max())
        if not off < 0.03:
            raise WrongResult(f"HiP differs from softmax over what it reads by {off:.1e}")


def _prompt(length: int, rounds: int) -> dict[str, Any]:
    q, k, v = _heads(length, length)
    attention, ctx = SPEC.build(), Context.of(q, k)
    cases: dict[str, Callable[[], Any]] = {
        "hip": lambda: attention(q, k, v, ctx),
        "search": lambda: attention.chosen(q, k, ctx),
        "flash": lambda: _flash(q, k, v),
    }
    return _row(["prompt", length], cases, rounds)


def _decode(length: int, rounds: int) -> dict[str, Any]:
    q, k, v = _heads(SPEC.refresh, length + SPEC.refresh)
    attention = SPEC.build()

    def steps(hip: bool) -> None:
        kept: dict[str, Any] = {}
        for i in range(SPEC.refresh):
            now = q[:, :, i : i + 1], k[:, :, : length + i + 1], v[:, :, : length + i + 1]
            if hip:
                attention(*now, replace(Context.of(*now[:2]), kept=kept))
            else:
                _flash(*now)

    cases = {"hip": lambda: steps(True), "flash": lambda: steps(False)}
    return _row(["decode", length], cases, rounds, SPEC.refresh)


def _row(case: list[Any], cases: dict[str, Callable[[], Any]], rounds: int, share: int = 1) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "gpu": torch.cuda.get_device_name()}
    for name, work in cases.items():
        row[f"{name}_ms"] = 1e3 * _seconds(work, rounds) / share
        row[f"{name}_memory_mib"] = _memory(work)
    row["over_flash"] = row["hip_ms"] / row["flash_ms"]
    return row


def _seconds(work: Callable[[], Any], rounds: int) -> float:
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


def _memory(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong, 2 without a GPU."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="tokens (default: 8192 to 131072)")
    given = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.hip_gpu needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    return answer("hip_gpu", given, ask)


if __name__ == "__main__":
    sys.exit(main())
