"""How fast is a whole attention layer, projections and all, beside x-transformers'?

Width 512, 8 heads, causal, float32: `MultiHeadAttention` with softmax and with mechanisms in its place, and
x-transformers' `Attention` with the same weights, with its flash switch (SDPA) and without.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import MultiHeadAttention

DIM, HEADS = 512, 8
NAMES = ("softmax", "linear", "lightning-attention", "flowformer", "lightnet")


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length and direction."""
    layers: dict[str, nn.Module] = {name: MultiHeadAttention(DIM, HEADS, mechanism=name) for name in NAMES}
    if options.x_transformers is not None:
        layers |= _peers(options.x_transformers, layers["softmax"])
    lengths = options.lengths or ([128] if options.quick else [1024, 4096])
    rounds = options.rounds or (1 if options.quick else 7)
    return [_row(layers, length, trained, rounds) for length in lengths for trained in (False, True)]


def _peers(folder: Path, ours: Any) -> dict[str, nn.Module]:
    """x-transformers' layers with our weights, checked to give our outputs."""
    sys.path.insert(0, str(folder))
    try:
        from x_transformers.x_transformers import Attention
    except ImportError as missing:
        raise WrongResult(f"x-transformers cannot be imported from {folder}: {missing}") from missing
    x = torch.randn(1, 48, DIM)
    found: dict[str, nn.Module] = {}
    for name, flash in (("x-transformers, flash", True), ("x-transformers", False)):
        peer = found[name] = Attention(dim=DIM, heads=HEADS, dim_head=DIM // HEADS, causal=True, flash=flash)
        pairs = (
            (peer.to_q, ours.queries), (peer.to_k, ours.keys), (peer.to_v, ours.values),
            (peer.to_out, ours.output),
        )  # fmt: skip
        for theirs, own in pairs:
            theirs.weight.data.copy_(own.weight.data)
        off = float((_out(peer, x) - ours(x)).abs().max())
        if not off <= 1e-5:
            raise WrongResult(f"{name} and MultiHeadAttention differ by {off:.1e}")
    return found


def _out(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def _row(layers: dict[str, nn.Module], length: int, trained: bool, rounds: int) -> dict[str, Any]:
    x = torch.randn(1, length, DIM)

    def run(layer: nn.Module) -> None:
        with torch.set_grad_enabled(trained):
            out = _out(layer, x)
            if trained:
                out.sum().backward()

    times = interleaved({name: lambda layer=layer: run(layer) for name, layer in layers.items()}, rounds)
    return {
        "case": f"{length}, {'forward and backward' if trained else 'forward'}",
        "softmax_ms": 1e3 * times.median("softmax"),
        **{f"{name} over it": times.ratio(name, "softmax") for name in layers if name != "softmax"},
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 1024 4096)")
    options.add_argument(
        "--x-transformers", type=Path, metavar="FOLDER", help="where x-transformers is installed"
    )
    return answer("layers", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
