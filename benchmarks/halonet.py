"""How fast is halo attention on a CPU: beside timm's HaloAttn, the 3 x 3 convolution it replaces, and a ViT?

Layers with their projections, from a map to a map of as many channels, float32, forward alone and with
backward. timm's is loaded from its file alone and given our weights; it computes the same. The convolution
has as many channels; of a ViT's block it is the half with attention, without MLP: LayerNorm, projections,
SDPA over all positions, output projection. `floor` is what the products alone take at the rate of large ones.

    python -m benchmarks.halonet --timm .../timm/layers/halo_attn.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import Times, interleaved
from regard.attention.halo import HaloAttention
from regard.studies.rounds import peak_bytes

ALLOWED = 2e-5


@dataclass(frozen=True)
class Case:
    """A batch of square maps, and the layer on them."""

    batch: int
    side: int
    channels: int
    heads: int
    block: int
    halo: int

    @property
    def name(self) -> str:
        heads = f"{self.heads} heads of {self.channels // self.heads}"
        return f"{self.side} x {self.side}, {heads}, batch {self.batch}"


CASES = (
    Case(1, 56, 64, 4, 8, 3), Case(4, 56, 64, 4, 8, 3), Case(1, 56, 128, 8, 8, 3),
    Case(1, 14, 256, 16, 7, 3), Case(8, 14, 256, 16, 7, 3), Case(8, 14, 256, 8, 7, 3),
)  # fmt: skip
SMALL = (Case(1, 8, 16, 2, 4, 1), Case(2, 14, 16, 2, 7, 2))
PARTS = ("forward", "training")


class ViTAttention(nn.Module):
    """The half of a ViT's block that attends, channels first."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out.transpose(1, 2).reshape(x.shape)


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a case and part."""
    theirs = None if options.timm is None else halo_attn(options.timm)
    rounds = options.rounds or (1 if options.quick else 15)
    cases = SMALL if options.quick else CASES
    chosen = [case for case in cases if not options.only or any(part in case.name for part in options.only)]
    return [_row(case, part, theirs, rounds, floor) for case in chosen for part in options.parts]


def halo_attn(path: Path) -> Any:
    """Return timm's class from its file, which imports others of its folder, without the rest of timm."""
    if not path.is_file():
        raise WrongResult(f"there is no file {path}; --timm is the path of timm/layers/halo_attn.py")
    package = types.ModuleType("timm_layers")
    package.__path__ = [str(path.parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HaloAttn


def layers_of(case: Case, theirs: Any) -> dict[str, nn.Module]:
    """Return the layers of a case, timm's with the weights of ours."""
    ours = HaloAttention(case.channels, heads=case.heads, block=case.block, halo=case.halo)
    found: dict[str, nn.Module] = {
        "halo": ours, "conv": nn.Conv2d(case.channels, case.channels, 3, padding=1, bias=False),
        "vit": ViTAttention(case.channels, case.heads),
    }  # fmt: skip
    if theirs is not None:
        found["timm"] = theirs(
            case.channels, num_heads=case.heads, block_size=case.block, halo_size=case.halo
        )
        found["timm"].load_state_dict(ours.state_dict())
    return found


def _row(case: Case, part: str, theirs: Any, rounds: int, floor: dict[str, float]) -> dict[str, Any]:
    torch.manual_seed(0)
    x, layers = torch.randn(case.batch, case.channels, case.side, case.side), layers_of(case, theirs)
    off = _hold(layers, x, case)
    work = {name: _work(layer, x, part == "training") for name, layer in layers.items()}
    times = interleaved(work, rounds)
    mine: HaloAttention = layers["halo"]  # type: ignore[assignment]
    products = 2 * mine.multiply_adds(x) * (3 if part == "training" else 1) / floor["matmul"]
    row = {
        "case": f"{case.name}, {part}", "ms": 1e3 * times.median("halo"),
        "images_a_second": case.batch / times.median("halo"), "floor_ms": 1e3 * products,
        **_beside(times, [name for name in layers if name != "halo"]),
        **{f"{name}_mb": peak_bytes(work[name]) / 2**20 for name in layers},
        "off_timm": off, "rounds": rounds, "dropped": times.dropped, "times": times.as_json(),
    }  # fmt: skip
    return {name: value for name, value in row.items() if value is not None}


def _beside(times: Times, others: list[str]) -> dict[str, float]:
    """Times of others over ours, for timm's with the least and the largest."""
    found = {f"{name}_over_halo": times.ratio(name, "halo") for name in others}
    if "timm" in others:
        found["timm_least"], found["timm_most"] = times.spread("timm", "halo")
    return found


def _work(layer: nn.Module, x: Tensor, training: bool) -> Callable[[], Any]:
    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def train() -> None:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            torch.autograd.grad(layer(given).square().sum(), [given, *layer.parameters()])

    return train if training else forward


def _hold(layers: dict[str, nn.Module], x: Tensor, case: Case) -> float | None:
    """Refuse an output that is not that of the definition in float64; return how far timm's is from ours."""
    ours = layers["halo"]
    with torch.no_grad():
        out = ours(x)
        exact = ours.double().reference(x[:1].double())
        ours.float()
        _near(out[:1], exact.float(), case, "the definition")
        return None if "timm" not in layers else _near(out, layers["timm"](x), case, "timm's")


def _near(found: Tensor, expected: Tensor, case: Case, whose: str) -> float:
    off = float((found - expected).abs().max())
    if not off < ALLOWED:
        raise WrongResult(f"{case.name}: attention differs from {whose} by {off:.1e}")
    return off


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--timm", type=Path, metavar="FILE", help="timm/layers/halo_attn.py, to be held to")
    options.add_argument("--only", nargs="+", metavar="PART", help="cases whose name has one of these parts")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is timed")
    return answer("halonet", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
