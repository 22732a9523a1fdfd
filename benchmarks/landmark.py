"""What do landmarks cost in training beside plain attention, and what do they save on long texts?

`train` times the grouped softmax, forward and in training, at the sizes of the paper's models, beside SDPA
over the same tokens and, with `--official FOLDER`, the official code in plain PyTorch (a checkout of
epfml/landmark-attention). `decode` times one token after many, heads of SmolLM2, beside SDPA over all keys;
`read` times reading a whole text block by block, beside SDPA.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import LandmarkMemory, landmark_attention

SIZES = {"lm_benchmark": (4, 8, 512, 128, 51), "llama": (1, 32, 512, 128, 64), "long": (1, 8, 4096, 64, 64)}
SMALL = {"lm_benchmark": (1, 2, 102, 16, 51)}
HEADS, KV_HEADS, WIDTH, BLOCK, TOP = 9, 3, 64, 64, 4
PARTS = ("train", "decode", "read")
OFFICIAL_LENGTH, LONG = 1024, 16384


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return the rows of the parts that are asked for."""
    official = None if options.official is None else official_softmax(options.official)
    _check(official)
    rounds = options.rounds or (1 if options.quick else 5)
    rows: list[dict[str, Any]] = []
    if "train" in options.parts:
        sizes = SMALL if options.quick else SIZES
        rows += [_train(name, size, official, rounds) for name, size in sizes.items()]
    lengths = options.lengths or ([512] if options.quick else [8192, 32768])
    if "decode" in options.parts:
        rows += [_decode(n, rounds) for n in lengths]
    if "read" in options.parts:
        rows += [_read(n, 1 if n > LONG else min(rounds, 3)) for n in lengths]
    return rows


def official_softmax(folder: Path) -> Callable[..., Any]:
    """Return `landmark_grouped_softmax` of a checkout, without importing what else is in its file."""
    path = folder / "lm_benchmark" / "models" / "landmark.py"
    if not path.is_file():
        raise WrongResult(f"{path} is not there; --official takes a checkout of epfml/landmark-attention")
    names = {"LandmarkGroupedSoftmaxFunction", "landmark_grouped_softmax"}
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    found: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(path), "exec"), found)
    softmax: Callable[..., Any] = found["landmark_grouped_softmax"]
    return softmax


def by_official(softmax: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, marks: Tensor) -> Tensor:
    """Attention with the official softmax, its masks made as its model makes them."""
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)[None, None]
    is_mem = marks.expand(q.shape[0], -1)[:, None, None].repeat(1, q.shape[1], 1, 1)
    with torch.no_grad():
        numbers = torch.where(hidden, 0.0, is_mem.cumsum(-1) - is_mem.int())
        last = numbers.amax(-1, keepdim=True) == numbers
        mask = hidden | (is_mem & last)
        last, is_mem = last & ~mask, is_mem & ~mask
    scores = scores.masked_fill(mask, -torch.inf)
    weights, _ = softmax(scores, -1, is_mem, mask, last, False, int(marks.sum(-1).max()) + 3)
    return weights @ v


def regular(length: int, block: int) -> Tensor:
    return (torch.arange(1, length + 1) % block == 0)[None]


def _check(official: Callable[..., Any] | None) -> None:
    """Refuse attention that is not the definition, in float64, or not the official code's."""
    q, k, v = torch.randn(3, 2, 3, 200, 16)
    marks = regular(200, 13).expand(2, -1)
    found = landmark_attention(q, k, v, marks)
    expected = landmark_attention(q.double(), k.double(), v.double(), marks, impl="matrix")
    ways = {"the definition": expected}
    if official is not None:
        ways["the official code"] = by_official(official, q, k, v, marks)
    for name, other in ways.items():
        off = float((found - other).abs().max())
        if off > 1e-5:
            raise WrongResult(f"landmark attention differs from {name} by {off:.1e}")
    memory = LandmarkMemory(block=13, top_k=20, local=26, positions="true").build()
    off = float((memory(q, k, v) - expected).abs().max())
    if off > 1e-5:
        raise WrongResult(f"a memory that reads all differs from the definition by {off:.1e}")


def _train(
    name: str, size: tuple[int, ...], official: Callable[..., Any] | None, rounds: int
) -> dict[str, Any]:
    batch, heads, length, width, block = size
    inputs, marks = [torch.randn(batch, heads, length, width) for _ in range(3)], regular(length, block)
    marks = marks.expand(batch, -1)
    given = [x.clone().requires_grad_() for x in inputs]
    ways: dict[str, Callable[..., Tensor]] = {
        "landmark": lambda *x: landmark_attention(*x, marks),
        "sdpa": lambda *x: scaled_dot_product_attention(*x, is_causal=True),
    }
    if official is not None and length <= OFFICIAL_LENGTH:
        ways["official"] = lambda *x: by_official(official, *x, marks)

    def trained(work: Callable[..., Tensor]) -> None:
        with torch.enable_grad():
            work(*given).sum().backward()

    cases: dict[str, Callable[[], Any]] = {}
    for way, work in ways.items():
        cases[way] = lambda work=work: work(*inputs)
        cases[f"{way}_both"] = lambda work=work: trained(work)
    times = interleaved(cases, rounds)
    peer = {
        "official_over_landmark": times.ratio("official", "landmark"),
        "official_both_over_landmark_both": times.ratio("official_both", "landmark_both"),
    } if "official" in ways else {}  # fmt: skip
    return {
        "case": [name, list(size)],
        "landmark_ms": 1e3 * times.median("landmark"),
        "landmark_both_ms": 1e3 * times.median("landmark_both"),
        "over_sdpa": times.ratio("landmark", "sdpa"),
        "both_over_sdpa": times.ratio("landmark_both", "sdpa_both"),
        **peer,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, HEADS, length, WIDTH)
    return q, torch.randn(1, KV_HEADS, length, WIDTH), torch.randn(1, KV_HEADS, length, WIDTH)


def _decode(length: int, rounds: int) -> dict[str, Any]:
    """One token after `length`, blocks of 64 and the 4 best read, positions anew."""
    _, k, v = _heads(length)
    memory = LandmarkMemory(block=BLOCK, top_k=TOP, rotary=10000.0).build()
    state = memory.absorb(k, v, HEADS)
    new = _heads(1)
    all_k, all_v = torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2)
    times = interleaved(
        {
            "landmark": lambda: memory.step(*new, state),
            "sdpa": lambda: scaled_dot_product_attention(new[0], all_k, all_v, enable_gqa=True),
        },
        4 * rounds, warm=2,
    )  # fmt: skip
    return {
        "case": ["decode", length],
        "landmark_ms": 1e3 * times.median("landmark"),
        "over_sdpa": times.ratio("landmark", "sdpa"),
        "share_of_tokens_read": (TOP + 1) * BLOCK / length,
        "rounds": 4 * rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _read(length: int, rounds: int) -> dict[str, Any]:
    """A whole text, in sections of 4 blocks."""
    q, k, v = _heads(length)
    memory = LandmarkMemory(block=BLOCK, top_k=TOP, local=4 * BLOCK, rotary=10000.0).build()
    times = interleaved(
        {
            "landmark": lambda: memory(q, k, v),
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        },
        rounds,
    )
    return {
        "case": ["read", length],
        "landmark_ms": 1e3 * times.median("landmark"),
        "over_sdpa": times.ratio("landmark", "sdpa"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--official", type=Path, metavar="FOLDER", help="checkout of the official code")
    options.add_argument("--lengths", type=int, nargs="+", help="tokens of a text (default: 8192 32768)")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return answer("landmark", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
