"""How fast is subspace attention on a CPU: beside the official code, what it replaces, and a ViT block?

Float32, four groups, maps of 56 x 56 of width 64 and of 14 x 14 of width 512, and 96 for the layer of
MobileNet-V2. Parts:

    layer   `ULSAM` beside the official module, a dense 3 x 3 convolution of that width, a 1 x 1 convolution,
            and a ViT block (LayerNorm, SDPA over all positions, LayerNorm, MLP of ratio 4)
    train   the same, forward with backward, all in training
    model   MobileNet-V2 at 224 x 224, plain and with two and four layers replaced

`--official DIR` is a checkout of Nandan91/ULSAM; its line that asks for CUDA is left out, ours takes its
weights and must give the same. Memory is the peak beyond what was held.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import ULSAM
from regard.attention.ulsam import fused_weights
from regard.models.images import cost, image_model
from regard.models.patches.vit import PlainViTConfig, ViTLayer
from regard.studies.rounds import peak_bytes

PARTS = ("layer", "train", "model")
MAPS = {"56 x 56, width 64": (56, 64), "14 x 14, width 512": (14, 512), "14 x 14, width 96": (14, 96)}
SMALL = {"14 x 14, width 16": (14, 16)}
GROUPS, HEAD = 4, 32
MODELS = ("mobilenet-v2", "mobilenet-v2-ulsam", "mobilenet-v2-ulsam-least")


class ChannelsFirst(nn.Module):
    """A layer of maps [B, H, W, C] as one of [B, C, H, W]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.movedim(1, 3)).movedim(3, 1)
        return out


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a part and map, and one for the models."""
    official = None if options.official is None else read(options.official)
    rounds = options.rounds or (1 if options.quick else 7)
    maps = SMALL if options.quick else MAPS
    batch = 2 if options.quick else options.batch
    rows = []
    for part in (part for part in PARTS if part in options.parts):
        if part == "model":
            rows.append(_models(*((1, 64) if options.quick else (batch, 224)), rounds))
            continue
        for name, (side, width) in maps.items():
            x = torch.randn(batch, width, side, side)
            ways = layers(width, side, official)
            check(ways, x)
            rows.append(_row(f"{part}, {name}", ways, x, part == "train", rounds))
    return rows


def read(folder: Path) -> Any:
    """Return the official module.

    Raises:
        WrongResult: where it is not there.
    """
    path = folder / "ulsam.py"
    if not path.is_file():
        raise WrongResult(f"{folder} has no ulsam.py; --official takes a checkout of Nandan91/ULSAM")
    lines = [line for line in path.read_text().splitlines() if "set_default_tensor_type" not in line]
    module = types.ModuleType("official_ulsam")
    exec("\n".join(lines), vars(module))
    return module


def layers(width: int, side: int, official: Any) -> dict[str, nn.Module]:
    """Return subspace attention, ours first, and what stands beside it."""
    ways: dict[str, nn.Module] = {"ours": ULSAM(width, GROUPS)}
    if official is not None:
        ways["official"] = official.ULSAM(width, width, side, side, GROUPS)
    config = PlainViTConfig(
        hidden_size=width, num_attention_heads=max(1, width // HEAD), intermediate_size=4 * width
    )
    return {
        **ways, "3 x 3": nn.Conv2d(width, width, 3, padding=1), "1 x 1": nn.Conv2d(width, width, 1),
        "vit": ChannelsFirst(ViTLayer(config, 0.0)),
    }  # fmt: skip


def check(ways: dict[str, nn.Module], x: Tensor) -> None:
    """Hold ours to the loop over groups in float64, and to the official code with the same weights.

    Raises:
        WrongResult: where they differ.
    """
    ours: Any = ways["ours"].eval()
    if "official" in ways:
        ours.load_state_dict(fused_weights(ways["official"].eval().state_dict()))
        _hold(ours(x), ways["official"](x), "the official code")
    exact = ours.double().reference(x.double())
    _hold(ours.float()(x), exact, "the loop over groups")


def _hold(found: Tensor, expected: Tensor, whose: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 1e-5:
        raise WrongResult(f"subspace attention differs from {whose} by {off:.1e}")


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


def _models(batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Times and operations of the whole networks, those with attention over the plain one's."""
    images = torch.randn(batch, 3, size, size)
    made = {name: image_model(name, num_labels=1000).eval() for name in MODELS}
    plain, *others = MODELS
    counts = {name: cost(model, size).multiply_adds for name, model in made.items()}
    times = interleaved({name: _work(model, images, False) for name, model in made.items()}, rounds)
    row: dict[str, Any] = {
        "case": f"model, {size} x {size}", "batch": batch, "ms": 1e3 * times.median(plain),
        "images_s": batch / times.median(plain),
    }  # fmt: skip
    for name in others:
        short = name.removeprefix("mobilenet-v2-")
        row[f"{short}_time_over_plain"] = times.ratio(name, plain)
        row[f"{short}_operations_over_plain"] = counts[name] / counts[plain]
    return {**row, "rounds": rounds, "dropped": times.dropped, "times": times.as_json()}


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
    options.add_argument("--official", type=Path, metavar="DIR", help="a checkout of Nandan91/ULSAM")
    return answer("ulsam", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
