"""How much faster than dense attention is HiP, and how does its cost grow?

`prefill` times attention alone, heads of SmolLM2, beside SDPA over all keys; `grows` is how its time has
grown since the first length, over how T log2(T / k) has. `decode` times tokens after many, one search serving
8 of them, beside SDPA. `model` times SmolLM2 itself: reading a text, and generating after as many tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.subject import forward, load, same, text_ids
from benchmarks.timing import interleaved
from regard.attention import Context, HiP, hip_attention, hip_mask
from regard.attention.hip.reference import seen_by_definition

HEADS, KV_HEADS, WIDTH = 9, 3, 64
PARTS = ("prefill", "decode", "model")
LENGTHS, SPEC, NEW = (8192, 16384, 32768), HiP(), 24


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return the rows of the parts that are asked for."""
    _check()
    rounds = options.rounds or (1 if options.quick else 3)
    lengths = options.lengths or ([1200, 1600] if options.quick else LENGTHS)
    rows: list[dict[str, Any]] = []
    if "prefill" in options.parts:
        rows += grown([_prefill(n, rounds) for n in lengths])
    if "decode" in options.parts:
        rows += [_decode(n, 3 * rounds) for n in lengths]
    if "model" in options.parts:
        model, tokenizer = load()
        length = 96 if options.quick else options.text
        rows += [_read(model, text_ids(tokenizer, length), 1), _generate(model, length, rounds)]
    return rows


def _heads(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)
    q, k, v = (torch.randn(1, heads, n, WIDTH) for heads, n in shapes)
    return q, k, v


def _check() -> None:
    """Refuse attention that is not softmax over the keys of the definition, or where k is large not all."""
    small = HiP(k=64, query_block=16, window=32, sink=8)
    for queries in (400, 1):
        q, k, v = _heads(queries, 400)
        ctx = Context.of(q, k)
        for spec in (small, replace(small, k=400)):
            seen = seen_by_definition(q, k, ctx, spec)
            expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            off = float((hip_attention(q, k, v, spec) - expected).abs().max())
            if off > 1e-5:
                raise WrongResult(f"HiP differs from its definition by {off:.1e}")
    if not seen.all():
        raise WrongResult("with k as large as the text, HiP does not read all of it")


def grown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of each row how its time has grown since the first, over how T log2(T / k) has."""

    def due(row: dict[str, Any]) -> float:
        length: int = row["case"][1]
        return length * math.log2(max(2.0, length / SPEC.k))

    first = rows[0]
    for row in rows:
        row["grows"] = row["hip_ms"] / first["hip_ms"] / (due(row) / due(first))
    return rows


def _prefill(length: int, rounds: int) -> dict[str, Any]:
    q, k, v = _heads(length, length)
    times = interleaved(
        {
            "hip": lambda: hip_attention(q, k, v, SPEC),
            "search": lambda: hip_mask(q, k, SPEC),
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        },
        rounds,
    )
    return {
        "case": ["prefill", length],
        "hip_ms": 1e3 * times.median("hip"),
        "search_ms": 1e3 * times.median("search"),
        "over_sdpa": times.ratio("hip", "sdpa"),
        "share_of_keys_read": (SPEC.k + SPEC.window + SPEC.sink) / (length / 2),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _decode(length: int, rounds: int) -> dict[str, Any]:
    """The mean time of 8 tokens, with the search that serves them."""
    q, k, v = _heads(SPEC.refresh, length + SPEC.refresh)
    attention = SPEC.build()

    def stepped(hip: bool) -> float:
        kept: dict[str, Any] = {}
        start = time.perf_counter()
        for i in range(SPEC.refresh):
            now = q[:, :, i : i + 1], k[:, :, : length + i + 1], v[:, :, : length + i + 1]
            if hip:
                attention(*now, replace(Context.of(*now[:2]), kept=kept))
            else:
                scaled_dot_product_attention(*now, enable_gqa=True)
        return (time.perf_counter() - start) / SPEC.refresh

    times = interleaved({"hip": lambda: stepped(True), "sdpa": lambda: stepped(False)}, rounds, warm=3)
    return {
        "case": ["decode", length],
        "hip_ms": 1e3 * times.median("hip"),
        "over_sdpa": times.ratio("hip", "sdpa"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _read(model: Any, ids: Tensor, rounds: int) -> dict[str, Any]:
    """Reading a text: logits of its last token."""
    with regard.swap(model, replace(SPEC, k=ids.shape[1])):
        same(forward(model, ids[:, :600]), forward(model, ids[:, :600]), "HiP that reads all")

    def swapped() -> None:
        with regard.swap(model, SPEC):
            forward(model, ids)

    times = interleaved({"hip": swapped, "plain": lambda: forward(model, ids)}, rounds, warm=0)
    return _of_model(["model", "prefill", ids.shape[1]], times, rounds)


def _generate(model: Any, length: int, rounds: int) -> dict[str, Any]:
    """Tokens after a cache of so many random keys and values, seconds a token."""
    from transformers import DynamicCache

    config = model.config
    ids = torch.randint(3, config.vocab_size, (1, length + 1))
    kept = [torch.randn(2, 1, KV_HEADS, length, WIDTH) for _ in range(config.num_hidden_layers)]

    def generated(spec: HiP | None) -> float:
        cache = DynamicCache(config=config)
        for layer, (k, v) in enumerate(kept):
            cache.update(k, v, layer)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        if spec is None:
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        else:
            with regard.swap(model, spec):
                model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        return (time.perf_counter() - start) / NEW

    times = interleaved({"hip": lambda: generated(SPEC), "plain": lambda: generated(None)}, rounds)
    return _of_model(["model", "a token after", length], times, rounds)


def _of_model(case: list[Any], times: Any, rounds: int) -> dict[str, Any]:
    return {
        "case": case,
        "hip_ms": 1e3 * times.median("hip"),
        "plain_ms": 1e3 * times.median("plain"),
        "over_plain": times.ratio("hip", "plain"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", help="keys (default: 8192 16384 32768)")
    options.add_argument("--text", type=int, default=8192, help="tokens that the model reads (default: 8192)")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return answer("hip", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
