"""How fast is attention to near keys on a GPU: beside FlexAttention, SDPA's flash over all keys, and natten?

Float16 or bfloat16, forward, and forward with backward. `tiles` is plain torch, `flex` FlexAttention compiled
with the same mask, `flash` sees all keys; natten, where it is installed, chooses its own kernel. Grids are
those of NAT's first levels, of a long text, of a latent image and of a latent video.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.neighborhood import ATTEND, SMALL, natten_or_none
from benchmarks.results import Rows, answer, parser
from benchmarks.scan_gpu import seconds

Case = tuple[int, tuple[int, ...], int, int, dict[str, Any]]
CASES: dict[str, Case] = {
    "NAT, level 1": (64, (56, 56), 4, 32, {"kernel_size": 7}),
    "NAT, level 1, dilation 8": (64, (56, 56), 4, 32, {"kernel_size": 7, "dilation": 8}),
    "NAT, level 2": (64, (28, 28), 8, 32, {"kernel_size": 7}),
    "plane 112, 13 x 13": (8, (112, 112), 4, 32, {"kernel_size": 13}),
    "latent image 128": (1, (128, 128), 24, 128, {"kernel_size": 33}),
    "text 32768, 1024, causal": (1, (32768,), 16, 128, {"kernel_size": 1024, "is_causal": True}),
    "latent video 16 x 48 x 80": (1, (16, 48, 80), 24, 128, {"kernel_size": (8, 16, 16)}),
}
TOLERANCE = 0.03


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a grid."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[options.dtype]
    _check(dtype)
    rounds = options.rounds or (3 if options.quick else 20)
    names = list(CASES)[:1] if options.quick else list(CASES)
    chosen = [name for name in names if not options.only or any(part in name for part in options.only)]
    return [_row(name, CASES[name], dtype, rounds) for name in chosen]


def _drawn(batch: int, grid: tuple[int, ...], heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    made = (torch.randn(batch, *grid, heads, width, device="cuda", dtype=dtype) for _ in range(3))
    return [x.requires_grad_() for x in made]


def _check(dtype: torch.dtype) -> None:
    """Refuse outputs and gradients that are not those of the definition in float64."""
    for name, (grid, options) in SMALL.items():
        given, attend = _drawn(1, grid, 4, 32, dtype), ATTEND[len(grid)]
        exact = _with_gradients(
            [x.detach().double().requires_grad_() for x in given], attend, options, "dense"
        )
        for impl in ("tiles", "flex"):
            for one, other in zip(_with_gradients(given, attend, options, impl), exact, strict=True):
                off = float((one - other).abs().max() / other.abs().max())
                if not off < TOLERANCE:
                    raise WrongResult(f"{name}, {impl}: off by {off:.1e}")


def _with_gradients(
    given: list[Tensor], attend: Callable[..., Tensor], options: dict[str, Any], impl: str
) -> list[Tensor]:
    with torch.enable_grad():
        out = attend(*given, **options, impl=impl)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), given)]


def _row(name: str, case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    batch, grid, heads, width, options = case
    given, attend = _drawn(batch, grid, heads, width, dtype), ATTEND[len(grid)]
    flat = [x.detach().flatten(1, -3).transpose(1, 2).contiguous().requires_grad_() for x in given]

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*flat)

    cases: dict[str, Callable[[], Tensor]] = {
        "tiles": lambda: attend(*given, **options),
        "flex": lambda: attend(*given, **options, impl="flex"),
        "flash": flash,
    }
    natten = natten_or_none()
    if natten is not None:
        theirs = getattr(natten, f"na{len(grid)}d")
        cases["natten"] = lambda: theirs(*given, **options)
    row: dict[str, Any] = {"case": f"{name}, {dtype}", "gpu": torch.cuda.get_device_name()}
    for way, work in cases.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            row[f"{way}_ms"] = 1e3 * seconds(work, rounds)
        row[f"{way}_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row[f"{way}_both_ms"] = 1e3 * seconds(lambda work=work: _both(work), rounds)
    for way in cases:
        row[f"{way}_over_tiles"] = row[f"{way}_ms"] / row["tiles_ms"]
        row[f"{way}_both_over_tiles"] = row[f"{way}_both_ms"] / row["tiles_both_ms"]
    return row


def _both(work: Callable[[], Tensor]) -> None:
    with torch.enable_grad():
        out = work()
        out.backward(torch.ones_like(out))


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong, 2 without a GPU."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="PART", help="cases whose name has one of these parts")
    options.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    given = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.neighborhood_gpu needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    return answer("neighborhood_gpu", given, ask)


if __name__ == "__main__":
    sys.exit(main())
