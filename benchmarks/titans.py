"""Is the speed of a neural memory the same at any length, and what does a decoded token cost late in a text?

Eight heads of width 64 in float32. `memory` times the recurrence alone, forward, and forward with backward at
the shortest length; `decode` times one token after few and after many, and counts the numbers in the state;
`peer` times titans-pytorch, where it is installed, with the same recurrence, beside this layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import NeuralMemory, Titans
from regard.engines.memory import Weights, apply, neural_memory

HEADS, WIDTH = 8, 64
DIM = HEADS * WIDTH
MEMORIES = {"matrix, b = 1": (1, 1), "matrix, b = 64": (1, 64), "two layers, b = 64": (2, 64)}
PARTS = ("memory", "decode", "peer")


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return the rows of the parts that are asked for."""
    for depth, chunk in MEMORIES.values():
        _check(depth, chunk)
    rounds = options.rounds or (1 if options.quick else 3)
    rows: list[dict[str, Any]] = []
    if "memory" in options.parts:
        lengths = options.lengths or ([128, 256] if options.quick else [4096, 32768])
        rows += [_memory(name, lengths, rounds) for name in MEMORIES]
    if "decode" in options.parts:
        before = (16, 80) if options.quick else (256, 16384)
        rows += [_decode(name, before, 2 if options.quick else 20, rounds) for name in LAYERS]
    if "peer" in options.parts and importlib.util.find_spec("titans_pytorch"):
        rows += [_peer(128 if options.quick else 512, depth, min(rounds, 3)) for depth in (1, 2)]
    return rows


def weights(depth: int) -> Weights:
    """Return the first weights of memories whose hidden layer is twice as wide."""
    sizes = [WIDTH, *[2 * WIDTH] * (depth - 1), WIDTH]
    return tuple(torch.randn(HEADS, a, b) * a**-0.5 for a, b in pairwise(sizes))


def given(length: int, chunk: int) -> tuple[Tensor, ...]:
    """Return q, k, v, theta, alpha, eta of one sequence."""
    q, k = normalize(torch.randn(2, 1, HEADS, length, WIDTH), dim=-1).unbind()
    theta, alpha, eta = torch.rand(3, 1, HEADS, length).unbind()
    return q, k, torch.randn(1, HEADS, length, WIDTH), 0.5 * theta / chunk, 0.05 * alpha, 0.5 * eta


def _check(depth: int, chunk: int) -> None:
    """Refuse a recurrence that differs from the equations, in float64, position by position."""
    tensors, first = given(100, chunk), weights(depth)
    found, _ = neural_memory(*tensors, weights=first, chunk=chunk)
    q, k, v, theta, alpha, eta = (x.double() for x in tensors)
    now = start = tuple(w[None].double() for w in first)
    surprise = tuple(torch.zeros_like(w) for w in now)
    for i in range(100):
        start = now if i % chunk == 0 else start
        held = tuple(w.detach().requires_grad_() for w in start)
        with torch.enable_grad():
            loss = (apply(held, k[:, :, i, None]) - v[:, :, i, None]).square().sum()
        steps, ages, keeps = (g[:, :, i, None, None] for g in (theta, alpha, eta))
        pairs = zip(surprise, torch.autograd.grad(loss, held), strict=True)
        surprise = tuple(keeps * s - steps * g for s, g in pairs)
        now = tuple((1 - ages) * w + s for w, s in zip(now, surprise, strict=True))
        expected = apply(now, q[:, :, i, None])[:, :, 0]
        off = (found[:, :, i] - expected).abs().max() / expected.abs().max()
        if off > 1e-4:
            raise WrongResult(
                f"the memory of {depth} layers, b = {chunk}, is off by {off:.1e} at position {i}"
            )


def _memory(name: str, lengths: list[int], rounds: int) -> dict[str, Any]:
    depth, chunk = MEMORIES[name]
    first, inputs = weights(depth), {n: given(n, chunk) for n in lengths}
    trained = [x.clone().requires_grad_() for x in inputs[lengths[0]]]

    def both() -> None:
        with torch.enable_grad():
            neural_memory(*trained, weights=first, chunk=chunk)[0].sum().backward()

    cases: dict[str, Callable[[], Any]] = {
        str(n): lambda n=n: neural_memory(*inputs[n], weights=first, chunk=chunk) for n in lengths
    }
    times = interleaved({**cases, "both": both}, rounds, extra=1)
    speeds = {f"tokens_s_{n}": n / times.median(str(n)) for n in lengths}
    low, high = str(lengths[0]), str(lengths[-1])
    return {
        "case": [name, "memory"],
        **speeds,
        "flat": lengths[-1] / lengths[0] / times.ratio(high, low),
        "backward_over_forward": times.ratio("both", low) - 1,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


LAYERS = {
    "lmm": NeuralMemory(dim=DIM, heads=HEADS, chunk_size=64),
    **{v: Titans(dim=DIM, heads=HEADS, variant=v, chunk_size=64) for v in ("mac", "mag", "mal")},
}


def _decode(name: str, before: tuple[int, int], tokens: int, rounds: int) -> dict[str, Any]:
    layer = LAYERS[name].build()
    states = {n: layer.step(torch.randn(1, n, DIM))[1] for n in before}
    token = torch.randn(1, 1, DIM)

    def several(state: Any) -> None:
        for _ in range(tokens):
            layer.step(token, state)

    times = interleaved({str(n): lambda n=n: several(states[n]) for n in before}, rounds)
    few, many = map(str, before)
    return {
        "case": [name, "decode"],
        "before": list(before),
        "ms_few": 1e3 / tokens * times.median(few),
        "ms_many": 1e3 / tokens * times.median(many),
        "many_over_few": times.ratio(many, few),
        "numbers": [sum(t.numel() for t in states[n]) for n in before],
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _peer(length: int, depth: int, rounds: int) -> dict[str, Any]:
    """This layer and titans-pytorch's, b = 64, momentum and decay of each token in both."""
    from titans_pytorch import NeuralMemory as Peer
    from titans_pytorch.memory_models import MemoryMLP

    peer = Peer(
        dim=DIM, dim_head=WIDTH, heads=HEADS, chunk_size=1, batch_size=64,
        model=MemoryMLP(WIDTH, depth, expansion_factor=2.0), mem_model_norm_add_residual=False,
        default_step_transform_max_lr=0.5,
    )  # fmt: skip
    chunked = Peer(
        dim=DIM, dim_head=WIDTH, heads=HEADS, chunk_size=64,
        model=MemoryMLP(WIDTH, depth, expansion_factor=2.0), default_step_transform_max_lr=0.5,
    )  # fmt: skip
    _check_peer(peer)
    layer, x = (
        NeuralMemory(dim=DIM, heads=HEADS, depth=depth, chunk_size=64).build(),
        torch.randn(1, length, DIM),
    )
    cases = {"regard": lambda: layer(x), "peer": lambda: peer(x), "peer_chunks": lambda: chunked(x)}
    times = interleaved(cases, rounds)
    return {
        "case": [f"{depth} layers, {length} tokens", "peer"],
        "regard_ms": 1e3 * times.median("regard"),
        "peer_ms": 1e3 * times.median("peer"),
        "peer_chunks_ms": 1e3 * times.median("peer_chunks"),
        "peer_over_regard": times.ratio("peer", "regard"),
        "chunks_over_regard": times.ratio("peer_chunks", "regard"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _check_peer(peer: Any) -> None:
    """Refuse where the recurrence on the peer's projections and gates is not the peer's."""
    x = torch.randn(1, 96, DIM)
    stored = peer.store_norm(x)
    k, v = (peer.split_kv_heads(f(stored)) for f in (peer.to_keys, peer.to_values))
    q = peer.split_heads(peer.to_queries(peer.retrieve_norm(x)))
    theta, alpha, eta = (
        f[0](stored).sigmoid().mT for f in (peer.to_adaptive_step, peer.to_decay_factor, peer.to_momentum)
    )
    out, _ = neural_memory(
        q, k, v, 0.5 * theta / WIDTH, alpha, eta, weights=tuple(peer.memory_model_parameters), chunk=64,
        activation="gelu",
    )  # fmt: skip
    gated = (out * peer.retrieve_gate(peer.retrieve_norm(x))).transpose(1, 2).flatten(2)
    expected = peer(x)[0]
    off = (peer.combine_heads(gated) - expected).abs().max() / expected.abs().max()
    if off > 1e-4:
        raise WrongResult(f"the memory and titans-pytorch's differ by {off:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="positions (default: 4096 32768)")
    options.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to time (default: all)"
    )
    return answer("titans", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
