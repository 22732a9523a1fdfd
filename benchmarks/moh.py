"""What does a head that is off save: of the call, of a layer, of SmolLM2, in prefill and in decoding?

`call` times attention with the heads of SmolLM2, so many of 9 on for each token, beside SDPA over all;
`decode` one token after many, the same. `layer` times whole layers with a learned router, leaving heads out
and computing them, beside the dense layer, forward and in training. `model` times SmolLM2 with its heads
routed by query norm beside SmolLM2 as it is. `peer` holds the layer to the official code of MoH-DiT and times
both, with `--official FOLDER`, a checkout of SkyworkAI/MoH.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import Times, interleaved
from regard.attention import Context, MultiHeadAttention, balance_loss
from regard.attention.moh import MoHAttention, apply_moh
from regard.attention.moh.function import weighted

HEADS, KV_HEADS, WIDTH = 9, 3, 64
DIM, LAYER_HEADS = 512, 8
SPLITS = {2: (1, 1), 4: (1, 3), 6: (4, 2), 8: (1, 7)}
PUBLISHED = {
    "dit-s-90": (384, 64, 6, 3, 2),
    "dit-b-90": (768, 64, 12, 6, 4),
    "dit-xl-90": (1152, 72, 24, 16, 3),
}
PARTS = ("call", "decode", "layer", "model", "peer")
TOLERANCE = 2e-5


def ask(options: argparse.Namespace, floor: dict[str, float]) -> Rows:
    """Return the rows of the parts that are asked for."""
    quick = options.quick
    rounds = options.rounds or (1 if quick else 5)
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    if "call" in options.parts:
        rows += [_call(n, on, rounds) for n in ([256] if quick else [2048, 8192]) for on in (3, 5, 7, 9)]
    if "decode" in options.parts:
        rows += [_decode(n, on, rounds) for n in ([600] if quick else [2048, 16384]) for on in (3, 5, 7, 9)]
    if "layer" in options.parts:
        rows += [_layer(n, on, rounds) for n in ([160] if quick else [1024, 4096]) for on in SPLITS]
    if "model" in options.parts and not quick:
        rows += [_model(1024, (1, 2), rounds), _model(1024, (4, 3), rounds)]
    if "peer" in options.parts and options.official is not None:
        official = official_layer(options.official)
        rows += [_peer(official, name, 64 if quick else 1024, rounds) for name in PUBLISHED]
    return rows


def _off(name: str, found: Tensor, expected: Tensor, most: float = TOLERANCE) -> None:
    off = float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1))
    if not off <= most:
        raise WrongResult(f"{name} is off by {off:.1e}")


def _gates(length: int, on: int, heads: int = HEADS) -> Tensor:
    """Gates [1, T, H] of which every token has `on`, any, above 0."""
    chosen = torch.rand(1, length, heads).topk(on, dim=-1).indices
    return torch.zeros(1, length, heads).scatter(-1, chosen, 1.0)


def _row(case: list[Any], share: float, times: Times, rounds: int, **ratios: Any) -> dict[str, Any]:
    return {
        "case": case,
        "share_on": share,
        "moh_ms": 1e3 * times.median("moh"),
        **{name: times.ratio(*pair) for name, pair in ratios.items()},
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _heads(rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, HEADS, rows, WIDTH)
    return q, torch.randn(1, KV_HEADS, keys, WIDTH), torch.randn(1, KV_HEADS, keys, WIDTH)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """As layers call it, which do not look for numbers that are not finite."""
    return weighted(q, k, v, gates, Context.of(q, k), True)


def _call(length: int, on: int, rounds: int) -> dict[str, Any]:
    q, k, v = _heads(length, length)
    gates = _gates(length, on)
    expected = _sdpa(q, k, v, True) * gates.transpose(1, 2)[..., None]
    _off(f"attention with {on} of {HEADS} heads", _attend(q, k, v, gates), expected)
    times = interleaved(
        {"moh": lambda: _attend(q, k, v, gates), "sdpa": lambda: _sdpa(q, k, v, True)}, rounds
    )
    return _row(["call", length, on], on / HEADS, times, rounds, over_sdpa=("moh", "sdpa"))


def _decode(length: int, on: int, rounds: int) -> dict[str, Any]:
    q, k, v = _heads(1, length)
    gates = _gates(1, on)
    _off("decoding", _attend(q, k, v, gates), _sdpa(q, k, v, False) * gates.transpose(1, 2)[..., None])
    work = {"moh": lambda: _attend(q, k, v, gates), "sdpa": lambda: _sdpa(q, k, v, False)}
    times = interleaved(work, 8 * rounds, warm=3)
    read = len({int(h) // (HEADS // KV_HEADS) for h in gates[0, 0].nonzero()[:, 0]})
    row = _row(["decode", length, on], on / HEADS, times, 8 * rounds, over_sdpa=("moh", "sdpa"))
    return {**row, "key_heads_read": read}


def _layer(length: int, on: int, rounds: int) -> dict[str, Any]:
    """A causal layer of 8 heads, its router as it starts, which chooses differently by token."""
    dense = MultiHeadAttention(DIM, LAYER_HEADS, positions="rotary")
    moh = MoHAttention.of(dense, *SPLITS[on], fine_tune=False).train()
    whole = copy.deepcopy(moh)
    whole.sparse = False
    x = torch.randn(1, length, DIM)
    with torch.no_grad():
        _off(f"a layer with {on} of {LAYER_HEADS} heads", moh(x), whole(x))

    def trained(layer: nn.Module) -> None:
        with torch.enable_grad():
            layer(x).sum().backward()

    cases: dict[str, Callable[[], Any]] = {}
    for name, layer in (("moh", moh), ("computed", whole), ("dense", dense)):
        cases[name] = lambda layer=layer: layer(x)
        cases[f"{name}_both"] = lambda layer=layer: trained(layer)
    with torch.no_grad():
        times = interleaved(cases, rounds)
    return _row(
        ["layer", length, on], on / LAYER_HEADS, times, rounds, over_dense=("moh", "dense"),
        computed_over_dense=("computed", "dense"), both_over_dense_both=("moh_both", "dense_both"),
    )  # fmt: skip


def _model(length: int, split: tuple[int, int], rounds: int) -> dict[str, Any]:
    """SmolLM2, prefill of a text and one token after it."""
    import regard

    plain, _ = regard.load()
    routed, computed = copy.deepcopy(plain), copy.deepcopy(plain)
    apply_moh(routed, *split)
    apply_moh(computed, *split, sparse=False)
    ids = torch.randint(100, 40_000, (1, length))
    caches: dict[str, Any] = {}
    models = {"moh": routed, "computed": computed, "dense": plain}
    with torch.no_grad():
        for name, model in models.items():
            told = model(ids)
            caches[name] = (told.past_key_values, told.logits)
        _off("SmolLM2 with heads left out", caches["moh"][1], caches["computed"][1], 1e-3)

        def token(name: str) -> None:
            cache = caches[name][0]
            models[name](ids[:, :1], past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)

        prefill = {name: lambda m=model: m(ids, logits_to_keep=1) for name, model in models.items()}
        step = {f"{name}_token": lambda n=name: token(n) for name in models}
        whole = interleaved(prefill, max(1, rounds // 2))
        steps = interleaved(step, 4 * rounds, warm=2)
    on = sum(split)
    row = _row(["model", length, on], on / HEADS, whole, rounds, over_dense=("moh", "dense"))
    return {
        **row,
        "computed_over_dense": whole.ratio("computed", "dense"),
        "token_ms": 1e3 * steps.median("moh_token"),
        "token_over_dense": steps.ratio("moh_token", "dense_token"),
        "token_times": steps.as_json(),
    }


def official_layer(folder: Path) -> type[nn.Module]:
    """Return `MoHAttention` of a checkout's MoH-DiT, without importing what else is in its file."""
    path = folder / "MoH-DiT" / "models.py"
    if not path.is_file():
        raise WrongResult(f"{path} is not there; --official takes a checkout of SkyworkAI/MoH")
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) == "MoHAttention"]
    found: dict[str, Any] = {
        "torch": torch, "nn": nn, "F": F, "math": math, "Final": torch.jit.Final,
        "use_fused_attn": lambda: True,
    }  # fmt: skip
    exec(compile(tree, str(path), "exec"), found)
    kind: type[nn.Module] = found["MoHAttention"]
    return kind


def as_official(kind: type[nn.Module], layer: MoHAttention) -> nn.Module:
    """Return the official layer with the weights of one of ours."""
    router = layer.router
    made: Any = kind(
        layer.dim, layer.heads, qkv_bias=True, shared_head=router.shared, routed_head=router.active,
        head_dim=layer.head_dim,
    )  # fmt: skip
    projections: list[Any] = [layer.queries, layer.keys, layer.values]
    with torch.no_grad():
        made.qkv.weight.copy_(torch.cat([p.weight for p in projections]))
        made.qkv.bias.copy_(torch.cat([p.bias for p in projections]))
        for theirs, ours in ((made.proj, layer.output), (made.wg, router.route), (made.wg_0, router.split)):
            theirs.load_state_dict(ours.state_dict())
        made.wg_1.load_state_dict(router.share.state_dict())
    return made


def _peer(kind: type[nn.Module], name: str, length: int, rounds: int) -> dict[str, Any]:
    dim, head_dim, heads, shared, active = PUBLISHED[name]
    ours = MoHAttention(dim, heads, shared, active, head_dim=head_dim, causal=False, bias=True).train()
    theirs: Any = as_official(kind, ours).train()
    x = torch.randn(2, length, dim)
    agreement = _agreement(name, ours, theirs, x)

    def trained(layer: nn.Module) -> None:
        with torch.enable_grad():
            layer(x).sum().backward()
        theirs.LOAD_BALANCING_LOSSES.clear()

    with torch.no_grad():
        times = interleaved(
            {
                "moh": lambda: ours(x),
                "official": lambda: theirs(x),
                "moh_both": lambda: trained(ours),
                "official_both": lambda: trained(theirs),
            },
            rounds,
        )
        theirs.LOAD_BALANCING_LOSSES.clear()
    row = _row(
        ["peer", name, length], (shared + active) / heads, times, rounds,
        official_over_moh=("official", "moh"), official_both_over_moh_both=("official_both", "moh_both"),
    )  # fmt: skip
    return {**row, **agreement}


@torch.enable_grad()
def _agreement(name: str, ours: MoHAttention, theirs: Any, x: Tensor) -> dict[str, float]:
    """Hold outputs, balance and gradients to the official code's; return how far they are off."""
    theirs.LOAD_BALANCING_LOSSES.clear()
    found, expected = ours(x), theirs(x)
    _off(f"the layer of {name}, beside the official code,", found, expected, 1e-5)
    balance, told = balance_loss(ours), theirs.LOAD_BALANCING_LOSSES[0]
    _off(f"the balance of {name}, beside the official code,", balance, told, 1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    router: Any = ours.router
    pairs = ((router.route, theirs.wg), (router.split, theirs.wg_0), (ours.output, theirs.proj))
    off = max(
        float((a.weight.grad - b.weight.grad).abs().max() / b.weight.grad.abs().max()) for a, b in pairs
    )
    if not off < 1e-3:
        raise WrongResult(f"gradients of {name} differ from the official code's by {off:.1e}")
    return {
        "off": float((found - expected).abs().max()),
        "off_balance": abs(float(balance - told)),
        "off_gradient": off,
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--official", type=Path, metavar="FOLDER", help="checkout of the official code")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return answer("moh", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
