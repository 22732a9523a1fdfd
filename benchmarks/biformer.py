"""How fast is bi-level routing attention on a CPU: beside the official code, SDPA to all, a convolution?

The three stages of BiFormer-T at 224 x 224, float32: maps of 56, 28 and 14 tokens a side, 7 x 7 regions, of
which each attends to 1, 4 and 16. Two parts:

    layer   `BRA` beside both official modules (the same weights, which must give the same), the same layer
            with SDPA over all tokens, and the depthwise 5 x 5 convolution that it has beside its attention
    block   a layer of BiFormer (convolution of positions, LayerNorm, BRA, LayerNorm, MLP of ratio 3) beside a
            ViT block of that width (LayerNorm, SDPA, LayerNorm, the same MLP)

each forward, and forward with backward. `--official DIR` is a checkout of rayleizhu/BiFormer; its older
module also needs einops, and is left out where that is missing. Memory is the peak beyond what was held.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import BRA
from regard.models.biformer import BiFormerConfig
from regard.models.biformer.model import MLP, BiFormerLayer
from regard.studies.rounds import peak_bytes

REGIONS = 7
STAGES = {"56 x 56": (56, 64, 2, 1), "28 x 28": (28, 128, 4, 4), "14 x 14": (14, 256, 8, 16)}
SMALL = {"14 x 14": (14, 16, 2, 4)}
PARTS = ("layer", "block")
Work = Callable[[Tensor], Tensor]


class Dense(nn.Module):
    """The projections of `BRA` around SDPA over all tokens of x [B, H, W, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return out


class ViTBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), over all tokens of x [B, H, W, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Dense(dim, heads), MLP(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class First(nn.Module):
    """A module of maps [B, dim, H, W] as one of [B, H, W, dim]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.movedim(-1, 1)).movedim(1, -1)
        return out


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a part, stage and direction."""
    rounds = options.rounds or (1 if options.quick else 7)
    stages = SMALL if options.quick else STAGES
    batch = 2 if options.quick else options.batch
    kinds = official(options.official)
    rows = []
    for part in options.parts:
        for name, (side, dim, heads, topk) in stages.items():
            x = torch.randn(batch, side, side, dim)
            ways = layers(x, heads, topk, kinds) if part == "layer" else blocks(dim, heads, topk)
            for training in (False, True):
                told = f"{part}, {name}, dim {dim}, {'forward and backward' if training else 'forward'}"
                rows.append(_row(told, ways, x, training, rounds))
    return rows


def official(folder: Path | None) -> dict[str, Any]:
    """Return the official modules, name -> class, from a checkout; none without one.

    Raises:
        WrongResult: where it is no such checkout.
    """
    if folder is None:
        return {}
    if not (folder / "ops" / "bra_nchw.py").is_file():
        raise WrongResult(
            f"{folder} has no ops/bra_nchw.py; --official takes a checkout of rayleizhu/BiFormer"
        )
    sys.path.insert(0, str(folder))
    found = {"nchw": importlib.import_module("ops.bra_nchw").nchwBRA}
    if importlib.util.find_spec("einops") is not None:
        found["legacy"] = importlib.import_module("ops.bra_legacy").BiLevelRoutingAttention
    return found


def layers(x: Tensor, heads: int, topk: int, kinds: dict[str, Any]) -> dict[str, nn.Module]:
    """Return what does a layer's work, ours first, checked against the definition and the official code.

    Raises:
        WrongResult: where outputs or gradients differ.
    """
    dim = x.shape[-1]
    ours = BRA(dim, heads, REGIONS, topk)
    exact = BRA(dim, heads, REGIONS, topk).double()
    exact.load_state_dict(ours.state_dict())
    some = x[:1]
    found = trained(some, ours)
    for one, other in zip(found, trained(some.double(), exact.reference), strict=True):
        _hold(one, other, "the definition")
    ways: dict[str, nn.Module] = {"ours": ours}
    for name, kind in kinds.items():
        theirs = kind(dim=dim, num_heads=heads, n_win=REGIONS, topk=topk, side_dwconv=5)
        ours.load_state_dict(theirs.state_dict())
        ways[name] = First(theirs) if name == "nchw" else theirs
        for one, other in zip(trained(some, ours), trained(some, ways[name]), strict=True):
            _hold(one, other, f"the official {name}")
    return {**ways, "dense": Dense(dim, heads), "conv": First(nn.Conv2d(dim, dim, 5, padding=2, groups=dim))}


def blocks(dim: int, heads: int, topk: int) -> dict[str, nn.Module]:
    """Return a layer of BiFormer, and a ViT block of its width."""
    config = BiFormerConfig(
        embed_dims=[dim], depths=[1], topks=[topk], regions=REGIONS, head_dim=dim // heads, drop_path_rate=0.0
    )
    return {"ours": BiFormerLayer(config, 0, 0.0), "vit": ViTBlock(dim, heads)}


def trained(x: Tensor, work: Work) -> list[Tensor]:
    """The output of `work`, and the gradient of x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = work(x)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), [x])]


def _hold(found: Tensor, expected: Tensor, whose: str) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 1e-4:
        raise WrongResult(f"bi-level routing attention differs from {whose} by {off:.1e}")


def _row(name: str, ways: dict[str, nn.Module], x: Tensor, training: bool, rounds: int) -> dict[str, Any]:
    works = {way: _work(module, x, training) for way, module in ways.items()}
    peaks = {way: peak_bytes(work) / 1e6 for way, work in works.items()}
    times = interleaved(works, rounds)
    row: dict[str, Any] = {
        "case": name,
        "ms": 1e3 * times.median("ours"),
        "images_s": len(x) / times.median("ours"),
    }
    others = [way for way in works if way != "ours"]
    row |= {f"{way}_over_ours": times.ratio(way, "ours") for way in others}
    row |= {"mb": peaks["ours"], **{f"{way}_mb": peaks[way] for way in others}}
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
    options.add_argument("--batch", type=int, default=8, help="images at once")
    options.add_argument("--official", type=Path, metavar="DIR", help="a checkout of rayleizhu/BiFormer")
    return answer("biformer", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
