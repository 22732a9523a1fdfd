"""What does a session cost where no attention weights are opened? Watching norms, scaling heads, padding."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import regard
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import forward, load, same, text_ids
from benchmarks.timing import interleaved
from regard.edit import ScaleHeads
from regard.lens import HeadOutputNorm, ResidualNorm, ValueNorm
from regard.runtime.mask import LazyMask

BOUND = 1.05
BATCH, PADDING = 4, (0, 17, 64, 130)


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row for each kind of session."""
    model, tokenizer = load()
    length = options.length or (64 if options.quick else 1024)
    rounds = options.rounds or (2 if options.quick else 11)
    ids = text_ids(tokenizer, length)
    sessions = {
        "watch, no lens": lambda: regard.watch(model),
        "watch, three lenses of norms": lambda: regard.watch(
            model, ValueNorm(), HeadOutputNorm(), ResidualNorm()
        ),
        "steer, ScaleHeads": lambda: regard.steer(model, ScaleHeads({(5, 3): 0.5, (12, 0): 0.0})),
    }
    _check(model, ids, sessions)

    def within(session: Any) -> Any:
        def run() -> None:
            with session():
                forward(model, ids)

        return run

    cases = {"plain": lambda: forward(model, ids), **{n: within(s) for n, s in sessions.items()}}
    times = interleaved(cases, rounds)
    rows = [_row(f"{name}, {length} tokens", times, name, rounds, BOUND) for name in sessions]
    return [*rows, _padded(model, tokenizer, 48 if options.quick else 256, rounds)]


def _row(case: str, times: Any, name: str, rounds: int, bound: float | None) -> dict[str, Any]:
    low, high = times.spread(name, "plain")
    return {
        "case": case,
        "plain_s": times.median("plain"),
        "session_s": times.median(name),
        "ratio": times.ratio(name, "plain"),
        "ratios": f"{low:.2f} - {high:.2f}",
        "bound": bound,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _check(model: Any, ids: Tensor, sessions: dict[str, Any]) -> None:
    """Refuse a watch that changes logits, and a ScaleHeads that is not a hook's scaling."""
    plain = forward(model, ids)
    for name, session in sessions.items():
        with session():
            found = forward(model, ids)
        expected = _scaled_by_hook(model, ids) if "ScaleHeads" in name else plain
        same(found, expected, name)
        if "ScaleHeads" in name and torch.equal(found, plain):
            raise WrongResult(f"{name}: it changed nothing.")


def _scaled_by_hook(model: Any, ids: Tensor) -> Tensor:
    width = model.config.hidden_size // model.config.num_attention_heads

    def scale(head: int, factor: float) -> Any:
        def hook(module: Any, args: Any) -> Any:
            x = args[0].clone()
            x[..., head * width : (head + 1) * width] *= factor
            return (x,)

        return hook

    layers = model.model.layers
    handles = [
        layers[layer].self_attn.o_proj.register_forward_pre_hook(scale(head, factor))
        for layer, head, factor in ((5, 3, 0.5), (12, 0, 0.0))
    ]
    try:
        return forward(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def _padded(model: Any, tokenizer: Any, length: int, rounds: int) -> dict[str, Any]:
    """A left-padded batch: the dense mask must be built once a forward, and is timed."""
    ids = text_ids(tokenizer, length, BATCH)
    pads = [min(pad, length // 2) for pad in PADDING]
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0

    def plain() -> Tensor:
        return forward(model, ids, attention_mask=mask)

    def inside() -> Tensor:
        with regard.watch(model):
            return forward(model, ids, attention_mask=mask)

    with _counted() as built:
        same(inside(), plain(), "left-padded batch")
    if len(built) != 1:
        raise WrongResult(f"the mask of a left-padded batch was built {len(built)} times in one forward.")
    times = interleaved({"plain": plain, "session": inside}, rounds)
    row = _row(f"watch, no lens, {BATCH} x {length} left-padded", times, "session", rounds, None)
    return {**row, "masks_built": len(built)}


@contextmanager
def _counted() -> Any:
    """Note every dense mask that is built."""
    built: list[tuple[int, ...]] = []
    original = LazyMask.to_dense

    def to_dense(self: LazyMask) -> Tensor:
        if self._dense is None:
            built.append(self.shape)
        return original(self)

    LazyMask.to_dense = to_dense  # type: ignore[method-assign]
    try:
        yield built
    finally:
        LazyMask.to_dense = original  # type: ignore[method-assign]


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--length", type=int, help="tokens (default: 1024)")
    return answer("untouched", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
