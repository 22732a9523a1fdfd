"""How fast is large-kernel attention on a CPU: beside the official code, a ViT block, a plain convolution?

The first and third stage of VAN-B1 at 224 x 224: maps of 56 x 56 of width 64 and of 14 x 14 of width 320,
float32. Three parts:

    gate    `LargeKernelAttention` beside the official LKA, the dense depthwise convolution of 23 x 23 that it
            decomposes, and, for its floor, its 1 x 1 convolution alone
    block   `LKABlock` beside the official block and a ViT block of that width and MLP ratio (LayerNorm, SDPA
            over all positions, LayerNorm, MLP)
    train   the same as `block`, forward with backward, both in training

`--official DIR` is a checkout of Visual-Attention-Network/VAN-Classification, whose imports of timm are given
stand-ins; ours takes its weights and must give the same. Memory is the peak beyond what was held.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import LargeKernelAttention, LKABlock
from regard.models.patches.vit import PlainViTConfig, ViTLayer
from regard.studies.rounds import peak_bytes

PARTS = ("gate", "block", "train")
STAGES = {"56 x 56, width 64": (56, 64, 8), "14 x 14, width 320": (14, 320, 4)}
SMALL = {"14 x 14, width 16": (14, 16, 2)}
HEAD = 32


class ChannelsFirst(nn.Module):
    """A layer of maps [B, H, W, C] as one of [B, C, H, W]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.movedim(1, 3)).movedim(3, 1)
        return out


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a part and stage."""
    official = None if options.official is None else read(options.official)
    rounds = options.rounds or (1 if options.quick else 7)
    stages = SMALL if options.quick else STAGES
    batch = 2 if options.quick else options.batch
    rows = []
    for part in options.parts:
        for name, (side, dim, ratio) in stages.items():
            x = torch.randn(batch, dim, side, side)
            ways = gates(dim, official) if part == "gate" else blocks(dim, ratio, official)
            check(ways, x[:1])
            rows.append(_row(f"{part}, {name}", ways, x, part == "train", rounds))
    return rows


def read(folder: Path) -> Any:
    """Return the official module.

    Raises:
        WrongResult: where it is not there, or cannot be imported.
    """
    given = {
        "timm": {}, "timm.models": {}, "timm.models.vision_transformer": {"_cfg": dict},
        "timm.models.layers": {
            "DropPath": nn.Identity, "to_2tuple": lambda n: (n, n), "trunc_normal_": nn.init.trunc_normal_,
        },
        "timm.models.registry": {"register_model": lambda entry: entry},
    }  # fmt: skip
    made: dict[str, Any] = {}
    for name, members in given.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(members)
    sys.path.insert(0, str(folder / "models"))
    try:
        with mock.patch.dict(sys.modules, made):
            return importlib.import_module("van")
    except ImportError as error:
        raise WrongResult(f"{folder} holds no models/van.py that can be imported: {error}") from None
    finally:
        sys.path.remove(str(folder / "models"))


def gates(dim: int, official: Any) -> dict[str, nn.Module]:
    """Return large-kernel attention, ours first, and what stands beside it."""
    ways: dict[str, nn.Module] = {"ours": LargeKernelAttention(dim)}
    if official is not None:
        ways["official"] = official.LKA(dim)
    ways["dense 23"] = nn.Conv2d(dim, dim, 23, padding=11, groups=dim)
    return {**ways, "1 x 1": nn.Conv2d(dim, dim, 1)}


def blocks(dim: int, ratio: int, official: Any) -> dict[str, nn.Module]:
    """Return a block, ours first, and what stands beside it."""
    ways: dict[str, nn.Module] = {"ours": LKABlock(dim, ratio, layer_scale=0.5)}
    if official is not None:
        ways["official"] = official.Block(dim, ratio)
    config = PlainViTConfig(
        hidden_size=dim, num_attention_heads=max(1, dim // HEAD), intermediate_size=ratio * dim
    )
    return {**ways, "vit": ChannelsFirst(ViTLayer(config, 0.0))}


def check(ways: dict[str, nn.Module], x: Tensor) -> None:
    """Hold ours to its definition in float64, and to the official code with the same weights.

    Raises:
        WrongResult: where they differ.
    """
    ours: Any = ways["ours"].eval()
    exact = ours.double().reference(x.double())
    _hold(ours.float()(x), exact, "its definition")
    if "official" in ways:
        ways["official"].eval().load_state_dict(ours.state_dict())
        _hold(ours(x), ways["official"](x), "the official code")


def _hold(found: Tensor, expected: Tensor, whose: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 1e-4:
        raise WrongResult(f"large-kernel attention differs from {whose} by {off:.1e}")


def _row(name: str, ways: dict[str, nn.Module], x: Tensor, training: bool, rounds: int) -> dict[str, Any]:
    works = {way: _work(module.train(training), x, training) for way, module in ways.items()}
    peaks = {way: peak_bytes(work) / 1e6 for way, work in works.items()}
    times = interleaved(works, rounds)
    others = [way for way in works if way != "ours"]
    return {
        "case": name, "batch": len(x), "ms": 1e3 * times.median("ours"),
        "images_s": len(x) / times.median("ours"),
        **{f"{way}_over_ours": times.ratio(way, "ours") for way in others},
        "mb": peaks["ours"], **{f"{way}_mb": peaks[way] for way in others},
        "rounds": rounds, "dropped": times.dropped, "times": times.as_json(),
    }  # fmt: skip


def _work(module: nn.Module, x: Tensor, training: bool) -> Callable[[], None]:
    def forward() -> None:
        module(x)

    def both() -> None:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            module(given).sum().backward()
        module.zero_grad(set_to_none=True)

    return both if training else forward


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" or ".join(PARTS)
    )
    options.add_argument("--batch", type=int, default=8, help="maps at once")
    options.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help="a checkout of VAN-Classification",
    )
    return answer("visual_attention_network", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
