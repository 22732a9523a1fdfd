"""How fast is lightning attention, beside causal SDPA and flash-linear-attention's CPU code, and in decoding?

Operator: eight heads of width 64, float32, decay by head. Decoding: a TransNormerLLM of four layers of width
512 beside a Llama of the same sizes, one token after so many others; Llama's keys and values are random.

    python -m benchmarks.lightning --fla /path/to/site-packages     with fla-core and einops in it
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import LightningAttention, decay_rates, lightning_attention
from regard.models.transnormer import TNLConfig, TNLForCausalLM

HEADS, WIDTH = 8, 64
SIZES = {
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
}  # fmt: skip
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return one row a length of the operator, and one a number of tokens before the decoded one."""
    peer = None if options.fla is None else fla_chunk(options.fla)
    check(peer)
    lengths, before = options.lengths, options.before
    if lengths is None:
        lengths = [128, 256] if options.quick else [512, 1024, 4096, 16384]
    if before is None:
        before = [64, 256] if options.quick else [1024, 8192, 65536]
    rounds = options.rounds or (1 if options.quick else 5)
    rows = [operator_row(length, rounds, peer, floor) for length in lengths]
    return [*rows, *(decode_row(length, rounds, 4) for length in before)]


def fla_chunk(packages: Path) -> Peer:
    """Return flash-linear-attention's chunked CPU function at a constant decay, from its file alone."""
    path = packages / "fla" / "ops" / "simple_gla" / "naive.py"
    if not path.is_file():
        raise WrongResult(f"{path} is not there; --fla names the folder that fla-core was installed into")
    sys.path.append(str(packages))
    spec = importlib.util.spec_from_file_location("fla_simple_gla_naive", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate = -decay_rates(HEADS).float().expand(q.shape[0], q.shape[2], HEADS)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = module.naive_chunk_simple_gla(q, k, v, gate, scale=1.0)[0]
        return out.transpose(1, 2)

    return run


def drawn(length: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]


def check(peer: Peer | None) -> None:
    """Every way gives the formula's numbers at 300 positions, and decoding those of the whole."""
    q, k, v = drawn(300)
    steps = torch.arange(300, dtype=torch.float64)
    left = (-decay_rates(HEADS)[:, None, None] * (steps[:, None] - steps)).exp().tril()
    expected = (q.double() @ k.double().mT * left) @ v.double()
    ways: dict[str, Peer] = {
        "mechanism": LightningAttention().build(),
        "tiles": tiles,
        **({"fla": peer} if peer else {}),
    }
    for name, way in ways.items():
        off = float((way(q, k, v).double() - expected).abs().max() / expected.abs().max())
        if not off < 1e-5:
            raise WrongResult(f"{name} is off by {off:.1e}")
    model, ids = transnormer(), torch.randint(512, (1, 40))
    whole = model(ids).logits
    cache = model(ids[:, :39]).past_key_values
    off = float((model(ids[:, 39:], past_key_values=cache).logits - whole[:, 39:]).abs().max())
    if not off < 1e-3 * float(whole.abs().max()):
        raise WrongResult(f"decoding is off by {off:.1e}")


def tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lightning_attention(q, k, v, decay_rates(HEADS), method="tiles")


def transnormer() -> TNLForCausalLM:
    torch.manual_seed(0)
    return TNLForCausalLM(TNLConfig(**SIZES, hidden_dim=512)).eval()


def operator_row(length: int, rounds: int, peer: Peer | None, floor: dict[str, float]) -> dict[str, Any]:
    q, k, v = drawn(length)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mechanism = LightningAttention().build()

    def both(way: Peer) -> Callable[[], None]:
        def run() -> None:
            with torch.enable_grad():
                way(*leaves).sum().backward()

        return run

    cases: dict[str, Callable[[], Any]] = {
        "chunk": lambda: mechanism(q, k, v),
        "tiles": lambda: tiles(q, k, v),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "chunk both": both(mechanism),
        "tiles both": both(tiles),
    }
    if peer is not None:
        cases |= {"fla": lambda: peer(q, k, v), "fla both": both(peer)}
    times = interleaved(cases, rounds)
    rate = 8 * length * WIDTH**2 * HEADS / times.median("chunk")
    row = {
        "case": [length, "operator"],
        "chunk_ms": 1e3 * times.median("chunk"),
        "of_floor": rate / floor["matmul"],
        "tiles_over_chunk": times.ratio("tiles", "chunk"),
        "sdpa_over_chunk": times.ratio("sdpa", "chunk"),
        "both_ms": 1e3 * times.median("chunk both"),
        "tiles_over_chunk_both": times.ratio("tiles both", "chunk both"),
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }
    if peer is not None:
        row["fla_over_chunk"] = times.ratio("fla", "chunk")
        row["fla_over_chunk_both"] = times.ratio("fla both", "chunk both")
    return row


def decode_row(before: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Time a decoded token after `before` others, and weigh what is kept for it."""
    model, ids = transnormer(), torch.randint(512, (1, before))
    other = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=2 * before)).eval()
    cache = model(ids, logits_to_keep=1).past_key_values
    random = DynamicCache()
    for layer in range(SIZES["num_hidden_layers"]):
        random.update(*torch.randn(2, 1, HEADS, before, WIDTH).unbind(), layer)
    kept = sum(x.nbytes for layer in cache.layers for x in layer.state)
    keys = sum(x.nbytes for layer in random.layers for x in (layer.keys, layer.values))
    one = ids[:, :1]

    def decode(model: Any, cache: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in range(tokens):
                model(one, past_key_values=cache)

        return run

    times = interleaved({"tnl": decode(model, cache), "llama": decode(other, random)}, rounds)
    return {
        "case": [before, "decode"],
        "token_ms": 1e3 * times.median("tnl") / tokens,
        "state_kib": kept / 1024,
        "llama_token_ms": 1e3 * times.median("llama") / tokens,
        "llama_cache_kib": keys / 1024,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="*", help="positions (default: 512 1024 4096 16384)")
    options.add_argument("--before", type=int, nargs="*", help="tokens before (default: 1024 8192 65536)")
    options.add_argument("--fla", type=Path, metavar="FOLDER", help="where fla-core and einops are installed")
    return answer("lightning", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
