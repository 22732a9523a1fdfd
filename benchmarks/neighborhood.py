"""How fast is attention to near keys on a CPU: beside compiled FlexAttention, SDPA over all keys, and natten?

Four heads of width 32, float32, grids of one to three axes. FlexAttention computes the same, of the same
mask; SDPA sees all keys, and so computes another thing. `backward` is backward alone over forward alone.
natten, where it is installed, is held to and timed once, at the smaller plane: on a CPU it has FlexAttention,
and that uncompiled.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention.neighborhood import na1d, na2d, na3d
from regard.attention.neighborhood.flex import block_mask, compiled_flex
from regard.attention.neighborhood.rules import axes_of

HEADS, WIDTH = 4, 32
ATTEND = {1: na1d, 2: na2d, 3: na3d}
Case = tuple[tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "plane 112, 13 x 13": ((112, 112), {"kernel_size": 13}),
    "plane 56, 7 x 7": ((56, 56), {"kernel_size": 7}),
    "plane 56, 7 x 7, dilation 8": ((56, 56), {"kernel_size": 7, "dilation": 8}),
    "sequence 16384, 255": ((16384,), {"kernel_size": 255}),
    "sequence 16384, 512, causal": ((16384,), {"kernel_size": 512, "is_causal": True}),
    "volume 16 x 28 x 28, 5 x 7 x 7": ((16, 28, 28), {"kernel_size": (5, 7, 7)}),
    "volume 16 x 28 x 28, 4 x 7 x 7, causal in time": (
        (16, 28, 28),
        {"kernel_size": (4, 7, 7), "is_causal": (True, False, False)},
    ),
}
SMALL: dict[str, Case] = {
    "sequence 40, 5": ((40,), {"kernel_size": 5}),
    "plane 12, 4 x 3": ((12, 12), {"kernel_size": (4, 3), "stride": (2, 1), "dilation": (2, 1)}),
    "plane 9, causal": ((9, 8), {"kernel_size": 3, "is_causal": (True, False)}),
    "volume 6": ((6, 5, 7), {"kernel_size": (3, 2, 4), "dilation": (2, 1, 1)}),
}
NATTEN: Case = ((56, 56), {"kernel_size": 7})


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a grid, and one for natten where it is there."""
    natten = natten_or_none()
    _check(natten)
    rounds = options.rounds or (1 if options.quick else 7)
    known = SMALL if options.quick else CASES
    chosen = [name for name in known if not options.only or any(part in name for part in options.only)]
    rows = [_row(name, known[name], rounds) for name in chosen]
    if natten is not None and (not options.only or "natten" in options.only):
        rows.append(_natten(natten, SMALL["plane 12, 4 x 3"] if options.quick else NATTEN))
    return rows


def natten_or_none() -> Any:
    """Return natten, or None where it is not installed."""
    try:
        import natten
    except ImportError:
        return None
    return natten


def by_natten(natten: Any, given: list[Tensor], options: dict[str, Any]) -> Tensor:
    """What natten's only way on a CPU gives."""
    attend = getattr(natten, f"na{given[0].ndim - 3}d")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out: Tensor = attend(*given, **options, backend="flex-fna")
    return out


def drawn(grid: tuple[int, ...]) -> list[Tensor]:
    """q, k and v, [1, X1.., H, D]."""
    return [torch.randn(1, *grid, HEADS, WIDTH) for _ in range(3)]


def trained(given: list[Tensor], work: Callable[..., Tensor]) -> list[Tensor]:
    """The output of `work`, and its gradients."""
    given = [x.detach().requires_grad_() for x in given]
    with torch.enable_grad():
        out = work(*given)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), given)]


def _check(natten: Any) -> None:
    """Refuse outputs and gradients that are not those of the definition in float64, or not natten's."""
    for name, (grid, options) in SMALL.items():
        given, attend = drawn(grid), ATTEND[len(grid)]
        found = trained(given, lambda *x, way=attend, told=options: way(*x, **told))
        exact = trained(
            [x.double() for x in given], lambda *x, way=attend, told=options: way(*x, **told, impl="dense")
        )
        for one, other in zip(found, exact, strict=True):
            _hold(one, other, name, "the definition")
        if natten is not None:
            _hold(found[0], by_natten(natten, given, options), name, "natten")


def _hold(found: Tensor, expected: Tensor, name: str, whose: str) -> float:
    off = float((found - expected).abs().max())
    if not off < 1e-5:
        raise WrongResult(f"{name}: attention differs from {whose} by {off:.1e}")
    return off


def _row(name: str, case: Case, rounds: int) -> dict[str, Any]:
    grid, options = case
    given, attend = drawn(grid), ATTEND[len(grid)]
    flat = [x.flatten(1, -3).transpose(1, 2).contiguous() for x in given]
    mask, flex = block_mask(axes_of(grid, **options), "cpu"), compiled_flex()
    off = _hold(
        attend(*given, **options).flatten(1, -3).transpose(1, 2), flex(*flat, block_mask=mask), name, "flex"
    )
    asked = [x.clone().requires_grad_() for x in given]

    def backward() -> float:
        with torch.enable_grad():
            loss = attend(*asked, **options).sum()
        start = time.perf_counter()
        torch.autograd.grad(loss, asked)
        return time.perf_counter() - start

    times = interleaved(
        {
            "near": lambda: attend(*given, **options),
            "flex": lambda: flex(*flat, block_mask=mask),
            "sdpa": lambda: scaled_dot_product_attention(*flat),
            "backward": backward,
        },
        rounds,
    )
    low, high = times.spread("flex", "near")
    return {
        "case": name,
        "ms": 1e3 * times.median("near"),
        "flex_over_near": times.ratio("flex", "near"),
        "flex_least": low,
        "flex_most": high,
        "sdpa_over_near": times.ratio("sdpa", "near"),
        "backward_over_near": times.ratio("backward", "near"),
        "off_flex": off,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _natten(natten: Any, case: Case) -> dict[str, Any]:
    grid, options = case
    given, attend = drawn(grid), ATTEND[len(grid)]
    expected: list[Tensor] = []
    off = 0.0

    def theirs() -> None:
        expected[:] = [by_natten(natten, given, options)]

    times = interleaved({"near": lambda: attend(*given, **options), "natten": theirs}, 1, warm=0)
    off = _hold(attend(*given, **options), expected[0], "natten's plane", "natten")
    return {
        "case": f"natten {natten.__version__}, {list(grid)}",
        "ms": 1e3 * times.median("near"),
        "natten_over_near": times.ratio("natten", "near"),
        "off_natten": off,
        "rounds": 1,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="PART", help="cases whose name has one of these parts")
    return answer("neighborhood", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
