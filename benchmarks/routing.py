"""What does routing attention cost beside plain attention and the public torch code?

`train` times eight heads at the sizes of the published models, forward and in training: balanced clusters
(topw), causal clusters of 2 x 256 keys, local heads in blocks of 256, and SDPA; with `--peer FOLDER` also
`KmeansAttention` of routing-transformer and `LocalAttention` of local-attention, which answer alike. `scale`
takes clusters of sqrt(T) tokens and causal clusters of as many keys, and fits how their time grows. `decode`
times one token after many, beside SDPA over all keys. FOLDER is where
`pip install --no-deps --target FOLDER` put the two packages with what they import: einops,
product-key-memory, mixture-of-experts, colt5-attention and hyper-connections.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from benchmarks.errors import WrongResult
from benchmarks.results import Rows, answer, parser
from benchmarks.timing import interleaved
from regard.attention import BalancedRouting, Context, Routing
from regard.attention.routing import RoutingHeads

HEADS, WIDTH, WINDOW, SIZE = 8, 64, 256, 512
PARTS = ("train", "scale", "decode")
DAMPING = 1e-5
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ask(options: Namespace, floor: dict[str, float]) -> Rows:
    """Return the rows of the parts that are asked for."""
    peers = None if options.peer is None else public(options.peer)
    torch.set_grad_enabled(False)
    _check(peers)
    rounds = options.rounds or (1 if options.quick else 3)
    rows: list[dict[str, Any]] = []
    if "train" in options.parts:
        rows += [_train(n, peers, rounds) for n in ([256] if options.quick else [4096, 8192])]
    if "scale" in options.parts:
        rows += _scale([256, 512] if options.quick else [1024, 2048, 4096, 8192, 16384], rounds)
    if "decode" in options.parts:
        rows += [_decode(n, 4 * rounds) for n in ([256] if options.quick else [8192, 32768])]
    return rows


def public(folder: Path) -> dict[str, Any]:
    """Return `KmeansAttention` and `LocalAttention` of the packages in a folder."""
    if not (folder / "routing_transformer").is_dir():
        raise WrongResult(f"{folder} holds no routing_transformer; --peer takes where pip --target put it")
    sys.path.insert(0, str(folder))
    try:
        from local_attention import LocalAttention  # type: ignore[import-not-found, unused-ignore]
        from routing_transformer.routing_transformer import (  # type: ignore[import-not-found, unused-ignore]
            KmeansAttention,
        )
    finally:
        sys.path.remove(str(folder))
    return {"kmeans": KmeansAttention, "local": LocalAttention}


def balanced(clusters: int, size: int, **options: Any) -> RoutingHeads:
    """Return heads of balanced clusters that answer as the public code does."""
    spec = BalancedRouting(
        heads=HEADS, width=WIDTH, local_heads=0, clusters=clusters, cluster_size=size, norm="l2",
        mask_self=True, damping=DAMPING, **options,
    )  # fmt: skip
    return spec.build()


def recent(clusters: int, size: int, **options: Any) -> RoutingHeads:
    """Return heads of causal clusters."""
    spec = Routing(
        heads=HEADS, width=WIDTH, local_heads=0, clusters=clusters, cluster_size=size, norm="l2",
        mask_self=True, **options,
    )  # fmt: skip
    return spec.build()


def local(window: int) -> RoutingHeads:
    """Return local heads."""
    return Routing(heads=HEADS, width=WIDTH, local_heads=HEADS, window=window).build()


def public_kmeans(peers: dict[str, Any], clusters: int, size: int, centroids: Tensor) -> Any:
    """Return the public module with shared queries and keys and given centroids."""
    made = peers["kmeans"](clusters, size, HEADS, WIDTH, causal=True, shared_qk=True)
    made.kmeans.means.copy_(centroids)
    made.kmeans.initted.fill_(True)
    return made


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return plain causal attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def given(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, the same as keys of length 1, and values."""
    q, v = torch.randn(2, 1, HEADS, length, WIDTH)
    return q, normalize(q, dim=-1), v


def _check(peers: dict[str, Any] | None) -> None:
    """Refuse routing that is not its definition, in float64, or not what the public code gives."""
    q, k, v = given(96)
    for heads in (balanced(4, 24), recent(4, 12), local(16)):
        found = heads.eval()(q, k, v)
        _same(found, heads.reference(q.double(), k.double(), v.double()), "its definition")
    if peers is None:
        return
    heads = balanced(4, 24).eval()
    assert heads.clusters is not None
    theirs = public_kmeans(peers, 4, 24, heads.clusters.centroids).eval()
    _same(heads(q, k, v), theirs(q, q, v)[0], "routing-transformer")
    near = peers["local"](window_size=16, causal=True)
    _same(local(16)(q, k, v), near(q[0], k[0], v[0])[None], "local-attention")


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    off = float((found - expected).abs().max())
    if off > 1e-4:
        raise WrongResult(f"routing attention differs from {what} by {off:.1e}")


def _train(length: int, peers: dict[str, Any] | None, rounds: int) -> dict[str, Any]:
    """Eight heads, forward and in training, in which the centroids move too."""
    size = min(SIZE, length // 4)
    clusters, inputs = length // size, given(length)
    ours = {
        "balanced": balanced(clusters, size),
        "causal": recent(clusters, size // 2),
        "local": local(WINDOW),
    }
    ways: dict[str, Way] = {
        **ours,
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    modules: list[Any] = list(ours.values())
    if peers is not None:
        assert ours["balanced"].clusters is not None
        theirs = public_kmeans(peers, clusters, size, ours["balanced"].clusters.centroids)
        near = peers["local"](window_size=WINDOW, causal=True)
        ways |= {"peer_kmeans": lambda q, k, v: theirs(q, q, v)[0], "peer_local": near}
        modules += [theirs, near]
    moving = [x.clone().requires_grad_() for x in inputs]

    def forward(work: Way) -> None:
        for module in modules:
            module.eval()
        work(*inputs)

    def trained(work: Way) -> None:
        for module in modules:
            module.train()
        with torch.enable_grad():
            work(*moving).sum().backward()

    cases: dict[str, Callable[[], Any]] = {}
    for name, work in ways.items():
        cases[name] = lambda work=work: forward(work)
        cases[f"{name}_both"] = lambda work=work: trained(work)
    times = interleaved(cases, rounds)
    ratios = {f"{n}_over_sdpa": times.ratio(n, "sdpa") for n in ours}
    ratios |= {f"{n}_both_over_sdpa_both": times.ratio(f"{n}_both", "sdpa_both") for n in ours}
    if peers is not None:
        for peer, own in (("peer_kmeans", "balanced"), ("peer_local", "local")):
            ratios[f"{peer}_over_{own}"] = times.ratio(peer, own)
            ratios[f"{peer}_both_over_{own}_both"] = times.ratio(f"{peer}_both", f"{own}_both")
    return {
        "case": ["train", length, clusters, size],
        **{f"{n}_ms": 1e3 * times.median(n) for n in ways},
        **ratios,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def _scale(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Clusters of sqrt(T) tokens at growing lengths."""
    rows = []
    for length in lengths:
        size = round(math.sqrt(length))
        clusters, inputs = length // size, given(length)
        ways: dict[str, Way] = {
            "balanced": balanced(clusters, size).eval(),
            "causal": recent(clusters, size).eval(),
            "sdpa": sdpa,
        }
        cases = {n: lambda work=work, given=inputs: work(*given) for n, work in ways.items()}
        times = interleaved(cases, rounds)
        rows.append(
            {
                "case": ["scale", length, clusters, size],
                **{f"{n}_ms": 1e3 * times.median(n) for n in ways},
                **{f"{n}_over_sdpa": times.ratio(n, "sdpa") for n in ("balanced", "causal")},
                "scores": clusters * size * size,
                "rounds": rounds,
                "dropped": times.dropped,
                "times": times.as_json(),
            }
        )
    for name in ("scores", "balanced_ms", "causal_ms", "sdpa_ms"):
        exponent = _exponent(lengths, [row[name] for row in rows])
        rows[-1][f"{name.removesuffix('_ms')}_exponent"] = exponent
    return rows


def _exponent(lengths: list[int], values: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    x, y = (torch.tensor(part, dtype=torch.float64).log() for part in (lengths, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _decode(length: int, rounds: int) -> dict[str, Any]:
    """One token after `length`, 16 clusters of which it sees the last 256 members of 2, ids of keys kept."""
    _, k, v = given(length)
    heads = recent(16, WINDOW).eval()
    kept = {"clusters": heads.assign(k[:, :, :-1])}
    q = torch.randn(1, HEADS, 1, WIDTH)
    ctx = replace(Context.of(q, k), kept=kept)

    def step() -> Tensor:
        kept["clusters"] = kept["clusters"][:, :, : length - 1]
        out: Tensor = heads(q, k, v, ctx)
        return out

    times = interleaved(
        {"causal": step, "sdpa": lambda: scaled_dot_product_attention(q, k, v)}, rounds, warm=2
    )
    return {
        "case": ["decode", length],
        "causal_ms": 1e3 * times.median("causal"),
        "over_sdpa": times.ratio("causal", "sdpa"),
        "share_of_keys_read": 2 * WINDOW / length,
        "rounds": rounds,
        "dropped": times.dropped,
        "times": times.as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask, and return the exit code: 1 where a result was wrong."""
    options = parser(__doc__)
    options.add_argument("--peer", type=Path, metavar="FOLDER", help="where the public packages are")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return answer("routing", options.parse_args(arguments), ask)


if __name__ == "__main__":
    sys.exit(main())
