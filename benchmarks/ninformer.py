"""How fast is a NiNformer block on a CPU: beside the official code, and a ViT block of equal width and MLP?

Float32. Part `sizes`: the official size for CIFAR-10, 14 x 14 and 56 x 56 tokens, forward, and forward with
backward; the most memory a forward holds; the floor is the block's multiply-adds at the machine's rate of
matrix products. Part `tokens`: one item, d 256 and h 512, 16 to 1024 tokens, beside the ViT block, which has
other operations: by multiply-adds both cost the same at 640 tokens. The block replaces no convolution. The
official ninformer.py is read from the folder given by `--official`, with einops in it, and ours held to it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention.ninformer import NiNBlock
from regard.models.patches.vit import PlainViTConfig, ViTLayer
from regard.studies.rounds import peak_bytes

PARTS = ("sizes", "tokens")
Sizes = tuple[int, int, int, int]
SIZES: dict[str, Sizes] = {
    "official, 8 x 8, d 256, h 512": (32, 64, 256, 512),
    "14 x 14, d 384, h 768": (16, 196, 384, 768),
    "56 x 56, d 64, h 128": (4, 3136, 64, 128),
}
SMALL: dict[str, Sizes] = {"official, 4 x 4, d 16, h 32": (2, 16, 16, 32)}
TOKENS, SMALL_TOKENS = (16, 64, 256, 1024), (4, 16)


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a size, and one a number of tokens."""
    official = None if options.official is None else read(options.official)
    rounds = options.rounds or (1 if options.quick else 9)
    rows: list[dict[str, Any]] = []
    if "sizes" in options.parts:
        known = SMALL if options.quick else SIZES
        rows += [_size(name, known[name], official, rounds, floor) for name in known]
    if "tokens" in options.parts:
        wide = (16, 32) if options.quick else (256, 512)
        rows += [_tokens(n, *wide, rounds) for n in (SMALL_TOKENS if options.quick else TOKENS)]
    return rows


def read(folder: Path) -> Any:
    """Return the official module.

    Raises:
        WrongResult: where it is not there, or cannot be imported.
    """
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("ninformer")
    except ImportError as error:
        raise WrongResult(f"{folder} holds no official ninformer.py that can be imported: {error}") from None
    finally:
        sys.path.remove(str(folder))


def vit_block(tokens: int, dim: int, hidden: int) -> nn.Module:
    """A ViT block of equal width and MLP, with heads of 32, or one head."""
    heads = max(1, dim // 32)
    config = PlainViTConfig(hidden_size=dim, num_attention_heads=heads, intermediate_size=hidden)
    return ViTLayer(config, 0.0).eval()


def trained(block: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    wanted = list(block.parameters())

    def step() -> None:
        with torch.enable_grad():
            torch.autograd.grad(block(x).sum(), wanted)

    return step


def operations(batch: int, tokens: int, dim: int, hidden: int) -> int:
    """Multiply-adds of a block."""
    return batch * tokens * dim * (dim + 6 * hidden)


def _size(name: str, sizes: Sizes, official: Any, rounds: int, floor: dict[str, float]) -> dict[str, Any]:
    batch, tokens, dim, hidden = sizes
    block, vit = NiNBlock(dim, tokens, hidden).eval(), vit_block(tokens, dim, hidden)
    x = torch.randn(batch, tokens, dim)
    side = int(tokens**0.5)
    plane = x.unflatten(1, (side, side))
    _hold(block(x), block.double().reference(x.double()), name, "the definition")
    block.float()
    ways: dict[str, tuple[nn.Module, Tensor]] = {"ours": (block, x), "vit": (vit, plane)}
    if official is not None:
        theirs = official.NiNBlock(dim, hidden, tokens, 0.0).eval()
        theirs.load_state_dict(block.state_dict())
        _hold(block(x), theirs(x), name, "the official code")
        ways["official"] = (theirs, x)
    cases: dict[str, Callable[[], Any]] = {}
    for way, (module, given) in ways.items():
        cases[way] = lambda module=module, given=given: module(given)
        cases[f"{way} trained"] = trained(module, given)
    times = interleaved(cases, rounds)
    least = 2 * operations(*sizes) / floor["matmul"]
    row: dict[str, Any] = {
        "case": name, "batch": batch, "ms": 1e3 * times.median("ours"),
        "items_a_second": batch / times.median("ours"), "over_floor": times.median("ours") / least,
        "trained_ms": 1e3 * times.median("ours trained"), "mb": peak_bytes(cases["ours"]) / 1e6,
    }  # fmt: skip
    for way in ("official", "vit"):
        if way in ways:
            row[f"{way}_over_ours"] = times.ratio(way, "ours")
            row[f"{way}_trained_over_ours"] = times.ratio(f"{way} trained", "ours trained")
            row[f"{way}_mb"] = peak_bytes(cases[way]) / 1e6
    return {**row, "rounds": rounds, "dropped": times.dropped, "times": times.as_json()}


def _tokens(tokens: int, dim: int, hidden: int, rounds: int) -> dict[str, Any]:
    block, vit = NiNBlock(dim, tokens, hidden).eval(), vit_block(tokens, dim, hidden)
    x = torch.randn(1, tokens, dim)
    side = int(tokens**0.5)
    plane = x.unflatten(1, (side, side))
    times = interleaved(
        {
            "ours": lambda: block(x), "vit": lambda: vit(plane), "ours trained": trained(block, x),
            "vit trained": trained(vit, plane),
        },
        rounds,
    )  # fmt: skip
    attention = tokens * dim * (4 * dim + 2 * tokens + 2 * hidden)
    return {
        "case": f"{tokens} tokens", "batch": 1, "ms": 1e3 * times.median("ours"),
        "trained_ms": 1e3 * times.median("ours trained"), "vit_over_ours": times.ratio("vit", "ours"),
        "vit_trained_over_ours": times.ratio("vit trained", "ours trained"),
        "vit_operations_over_ours": attention / operations(1, tokens, dim, hidden),
        "rounds": rounds, "dropped": times.dropped, "times": times.as_json(),
    }  # fmt: skip


def _hold(found: Tensor, expected: Tensor, name: str, whose: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 1e-5:
        raise WrongResult(f"{name}: the block differs from {whose} by {off:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to time")
    options.add_argument("--official", type=Path, metavar="DIR", help="folder of the official ninformer.py")
    return answer("ninformer", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
