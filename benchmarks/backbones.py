"""What do the image models cost: parameters, operations, images a second, memory, beside a ViT of their size?

Every registered image model, forward, float32, fresh weights: those below a million parameters in batches
of 8 at 32 x 32 (a model of one size at its own), the others one image at 224 x 224. The ViT is the preset
that is nearest in parameters, its width changed until they are equal within a tenth, with the patches of
the model, or of 16, and of 4 at 32 x 32. A model is timed only where a batch gives what its images give one
by one. Nothing is trained: this is cost alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import lru_cache
from typing import Any

import torch

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.models.images import cost, image_model, image_models, matched
from regard.studies.rounds import peak_bytes

SMALL, LABELS = 1_000_000, 1000
QUICK = ("nat-nano", "mixer-digits")
VITS = ("vit-digits", "vit-nano", "vit-tiny", "vit-small", "vit-base")


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a model."""
    known = QUICK if options.quick else image_models()
    chosen = [n for n in known if not options.only or any(part in n for part in options.only)]
    rounds = options.rounds or (1 if options.quick else 5)
    most = options.most * 1e6
    rows = []
    for name in chosen:
        parameters = count(name)
        if parameters <= most:
            rows.append(_row(name, parameters, rounds, floor))
    return rows


@lru_cache(maxsize=128)
def count(name: str) -> int:
    """Parameters of a model, which is not filled with numbers for that."""
    with torch.device("meta"):
        model = image_model(name, num_labels=LABELS)
    return sum(p.numel() for p in model.parameters())


def size_of(model: Any, parameters: int) -> tuple[int, int]:
    """Height and width that a model is tried at."""
    size = getattr(model.config, "image_size", None) or (32 if parameters < SMALL else 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def vit_beside(parameters: int, size: tuple[int, int], patch: int | None = None) -> Any:
    """A ViT of nearly as many parameters, for images of a size."""
    patch = patch or (16 if min(size) >= 64 else max(1, min(size) // 8))
    name = min(VITS, key=lambda n: abs(math.log(count(n) / parameters)))
    with torch.device("meta"):
        heads = image_model(name).config.num_attention_heads
    told = {"image_size": list(size), "patch_size": patch, "num_labels": LABELS}
    config = matched(name, parameters, "hidden_size", within=0.1, step=heads, **told)
    return image_model(name, hidden_size=config.hidden_size, **told)


def _row(name: str, parameters: int, rounds: int, floor: dict[str, float]) -> dict[str, Any]:
    model = image_model(name, num_labels=LABELS).eval()
    size = size_of(model, parameters)
    batch = 8 if parameters < SMALL else 1
    vit = vit_beside(parameters, size, getattr(model.config, "patch_size", None)).eval()
    x = torch.randn(max(2, batch), 3, *size)
    _hold(model, x[:2], name)
    x = x[:batch]
    told, beside = cost(model, size), cost(vit, size)
    times = interleaved({"model": lambda: model(x), "vit": lambda: vit(x)}, rounds)
    seconds = times.median("model")
    return {
        "case": name, "image": f"{size[0]} x {size[1]}", "m_parameters": parameters / 1e6,
        "g_multiply_adds": told.multiply_adds / 1e9, "images_a_second": batch / seconds,
        "over_floor": seconds * floor["matmul"] / (2 * batch * told.multiply_adds),
        "mb": peak_bytes(lambda: model(x)) / 1e6, "vit_m_parameters": beside.parameters / 1e6,
        "vit_g_multiply_adds": beside.multiply_adds / 1e9, "vit_time_over_model": times.ratio("vit", "model"),
        "vit_mb": peak_bytes(lambda: vit(x)) / 1e6, "batch": batch, "rounds": rounds,
        "dropped": times.dropped, "times": times.as_json(),
    }  # fmt: skip


def _hold(model: Any, x: torch.Tensor, name: str) -> None:
    """Refuse a model whose batch is not its images one by one."""
    together = model(x).logits
    alone = torch.cat([model(x[i : i + 1]).logits for i in range(len(x))])
    off = float((together - alone).abs().max() / alone.abs().max())
    if not off < 1e-3:
        raise WrongResult(f"{name}: a batch differs from its images one by one by {off:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", metavar="PART", help="models whose name has one of these parts")
    options.add_argument("--most", type=float, default=100, help="millions of parameters (default: 100)")
    return answer("backbones", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
