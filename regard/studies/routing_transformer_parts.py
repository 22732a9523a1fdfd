"""Parts of the study `routing-transformer`: planted clusters, leaks, recall, language models and controls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regard.attention.routing import RoutingHeads

WIDTH, KEYS, VALUES = 64, 200, 16
CLUSTERS, SIZE = 16, 24


def heads(kind: str) -> RoutingHeads:
    """Return the one head that an arm of recall attends by; all have scale 1 / sqrt(D) and mask the self."""
    from regard.attention import BalancedRouting, Routing

    shared: dict[str, Any] = {
        "heads": 1, "width": WIDTH, "local_heads": 0, "scale": WIDTH**-0.5, "mask_self": True, "decay": 1.0,
    }  # fmt: skip
    learned: dict[str, Any] = {"decay": 0.99, "start": "lloyd"}
    many: dict[str, Any] = {"clusters": CLUSTERS, "cluster_size": SIZE}
    made: dict[str, Any] = {
        "dense": lambda: BalancedRouting(**shared, clusters=1, cluster_size=2 * KEYS),
        "window": lambda: Routing(**shared, clusters=1, nearest=1, cluster_size=SIZE),
        "random": lambda: BalancedRouting(**shared, **many),
        "fixed": lambda: BalancedRouting(**shared, **many),
        "routing": lambda: BalancedRouting(**{**shared, **many, **learned}),
        "causal_fixed": lambda: Routing(**shared, **many),
        "causal": lambda: Routing(**{**shared, **many, **learned}),
    }
    built: RoutingHeads = made[kind]().build()
    return randomised(built) if kind == "random" else built


def randomised(module: RoutingHeads) -> RoutingHeads:
    """Let a head put its tokens into clusters by chance, anew in every forward, and return it."""
    import torch

    clusters = module.clusters
    assert clusters is not None
    turn = [0]

    def settle() -> None:
        turn[0] += 1

    def affinity(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(turn[0])
        return torch.rand(len(x), x.shape[1], clusters.count, x.shape[2], generator=generator)

    clusters.settle, clusters.affinity = settle, affinity  # type: ignore[method-assign]
    return module


def recall_model(kind: str) -> nn.Module:
    """Return a model of one layer: x + W_o attention(W x, W x, W_v x), then logits of values."""
    import torch
    from torch import nn

    class Recall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
            eye = torch.eye(WIDTH)
            self.shared, self.value, self.out = (
                nn.Parameter(size * eye + 0.02 * torch.randn(WIDTH, WIDTH)) for size in (1.0, 1.0, 0.5)
            )
            self.readout, self.attention = nn.Linear(WIDTH, VALUES), heads(kind)

        def forward(self, keys: Tensor, values: Tensor) -> Tensor:
            x = self.keys(keys) + self.values(values)
            q, v = (x @ self.shared)[:, None], (x @ self.value)[:, None]
            logits: Tensor = self.readout(x + self.attention(q, q, v)[:, 0] @ self.out)
            return logits

    return Recall()


def recall_batch(count: int, pairs: int, generator: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values of tokens, [count, 2 pairs], and answers [count, pairs] to the second half.

    A token of the first half is a key and a value; one of the second a key and the marker of a question.
    """
    import torch

    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, keys.shape, generator=generator)
    order = torch.rand(keys.shape, generator=generator).argsort(1)
    marks = torch.full_like(values, VALUES)
    return torch.cat([keys, keys.gather(1, order)], 1), torch.cat([values, marks], 1), values.gather(1, order)


def planted() -> dict[str, float]:
    """Return the mass of dense attention that is kept where 512 tokens lie around 16 directions."""
    import torch

    from regard.attention import BalancedRouting, Context
    from regard.attention.routing.clusters import normalized
    from regard.attention.select import kept_mass

    length, clusters, size = 512, 16, 48
    directions = normalized(torch.randn(clusters, WIDTH), "layernorm")
    noise = torch.randn(2, 1, 1, length, WIDTH)
    q, k = normalized(directions[torch.arange(length) % clusters] + noise, "layernorm")
    weights = (q @ k.transpose(2, 3)).softmax(-1)
    spec = BalancedRouting(heads=1, width=WIDTH, local_heads=0, clusters=clusters, cluster_size=size)
    attention, ctx = spec.build().eval(), Context.of(q, k, causal=False)
    found = {}
    for name in ("fixed", "learned"):
        if name == "learned":
            assert attention.clusters is not None
            attention.clusters.begin(torch.cat([q, k], 2))
        rows = attention.looked_at(q, k, ctx)
        assert rows is not None
        seen = rows(0, length)
        found[f"mass_{name}"] = float(kept_mass(weights, seen).mean())
        found[f"seen_{name}"] = float(seen.sum(-1).float().mean())
    by_chance = torch.rand(1, 1, length, length).argsort(-1) < size
    return {**found, "mass_random": float(kept_mass(weights, by_chance).mean())}


def leak() -> dict[str, float]:
    """Return how far outputs move where only later tokens change, and how exact one cluster of all is."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from regard.attention import routing_attention
    from regard.attention.routing.clusters import normalized

    q, k, v = torch.randn(3, 1, 2, 128, 32, dtype=torch.float64)
    mu = torch.randn(2, 8, 32)
    found: dict[str, float] = {}
    for name, selection in (("leak_topw", "topw"), ("leak_causal", "causal")):
        others = [torch.cat([x[:, :, :64], torch.randn(1, 2, 64, 32, dtype=x.dtype)], 2) for x in (q, k, v)]
        one, other = (
            routing_attention(a, b, c, mu, cluster_size=16, selection=selection)[:, :, :64]
            for a, b, c in ((q, k, v), others)
        )
        found[name] = float((one - other).norm() / one.norm())
    a, b = normalized(q, "layernorm"), normalized(k, "layernorm")
    exact = scaled_dot_product_attention(a, b, v, is_causal=True, scale=1.0)
    for name, count in (("exact", 1), ("inexact", 2)):
        given = routing_attention(q, k, v, mu[:, :count], cluster_size=128 // count, selection="topw")
        found[name] = float((1.01 * given - exact).norm() / exact.norm())
    return found


def language_model(kind: str) -> nn.Module:
    """Return a small language model, the same for all kinds but for its attention."""
    from regard.models.routing import RoutingConfig, RoutingForCausalLM

    ways: dict[str, dict[str, Any]] = {
        "full": {"cluster_layers": 0, "window": 256},
        "local": {"cluster_layers": 0},
        "random": {"decay": 1.0},
        "routing": {"decay": 0.99, "start": "lloyd"},
    }
    options = {"window": 32, "clusters": 8, "cluster_size": 32, "pad_token_id": None, **ways[kind]}
    model = RoutingForCausalLM(
        RoutingConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.1,
            **options,
        )
    )
    if kind == "random":
        for layer in model.model.layers:
            randomised(layer.mixer.attention.mechanism)
    return model
