"""Routing attention: online k-means, balanced and causal clusters, decoding, planted clusters, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import regard
from regard.attention import (
    BalancedRouting,
    Clusters,
    Context,
    MultiHeadAttention,
    Routing,
    commitment_loss,
    routing_attention,
)
from regard.attention.routing import RoutingHeads
from regard.attention.select import kept_mass
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from tests.attention.models import generated, prompt
from tests.support.families import FAMILIES

SIZES = {"heads": 4, "width": 8, "clusters": 3, "window": 5}
EACH = [*Routing.examples(), *BalancedRouting.examples()]


def drawn(length, keys=None, *, batch=2, heads=4, kv_heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed + length)
    shapes = (heads, length), *(2 * [(kv_heads, keys or length)])
    return [torch.randn(batch, h, n, 8, generator=generator, dtype=torch.float64) for h, n in shapes]


def normal(x):
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def test_with_one_cluster_of_all_it_is_softmax_of_normalised_vectors():
    q, k, v = drawn(20)
    for selection, shrunk in (("topw", 1.01), ("causal", 1.0)):
        found = routing_attention(
            q, k, v, torch.ones(1, 1, 8), cluster_size=20, selection=selection, nearest=1
        )
        expected = scaled_dot_product_attention(normal(q), normal(k), v, is_causal=True, scale=1.0)
        torch.testing.assert_close(found, expected / shrunk)


@pytest.mark.parametrize("spec", EACH, ids=lambda spec: f"{spec.selection} {spec.norm}")
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_what_it_looks_at_is_what_has_weight(spec, side):
    q, k, _ = drawn(29)
    valid = None
    if side != "none":
        valid = torch.ones(2, 29, dtype=torch.bool)
        valid[0, slice(0, 9) if side == "left" else slice(20, 29)] = False
    attention = spec.build()
    for causal in sorted({True, "full" not in attention.orders}):
        ctx = Context.of(q, k, causal=causal, valid=valid)
        rows = attention.looked_at(q, k, ctx)
        weights = attention.matrix(q, k, ctx) > 0
        found = torch.cat([rows(0, 7), rows(7, 29)], 2)
        assert found.shape == weights.shape
        extra = found & ~weights
        if spec.mask_self:
            extra = extra & ~torch.eye(29, dtype=torch.bool)
        assert not (weights & ~found).any() and not extra.any()


def test_a_later_token_moves_balanced_clusters_and_no_causal_ones():
    q, k, v = drawn(24)
    later = [torch.cat([x[:, :, :12], 3 * x[:, :, 12:]], 2).roll(0) for x in (q, k, v)]
    later[0][:, :, 12:], later[1][:, :, 12:] = q[:, :, :12], k[:, :, :12]
    mu = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        for spec, same in (
            (Routing(cluster_size=4, **SIZES), True),
            (BalancedRouting(cluster_size=8, **SIZES), False),
        ):
            module = spec.build().train(training)
            module.clusters.centroids = mu[:2]
            before = module(q, k, v)[:, :2, :12]
            module.clusters._seen = None
            assert torch.equal(module(*later)[:, :2, :12], before) == same


def test_tokens_of_no_cluster_get_nothing_and_that_is_warned_of():
    q, k, v = drawn(40)
    with pytest.warns(UserWarning, match="hold at most 10 of 40 tokens"):
        out = routing_attention(q, k, v, torch.randn(4, 2, 8), cluster_size=5, selection="topw", causal=False)
    assert ((out == 0).all(-1).sum(-1) >= 30).all() and ((out != 0).any(-1).sum(-1) >= 5).all()


def test_a_masked_self_is_used_only_where_nothing_else_is_seen():
    q, _, v = drawn(6, batch=1, heads=1, kv_heads=1)
    for selection in ("topw", "causal"):
        options = {"cluster_size": 6, "selection": selection, "nearest": 1, "damping": 0.0}
        out = routing_attention(q, q, v, torch.ones(1, 1, 8), mask_self=True, **options)
        scores = normal(q) @ normal(q).transpose(2, 3)
        hidden = torch.ones(6, 6, dtype=torch.bool).triu()
        hidden[0, 0] = False
        torch.testing.assert_close(out, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        unmasked = routing_attention(q, q, v, torch.ones(1, 1, 8), **options)
        assert torch.equal(unmasked[:, :, 0], out[:, :, 0]) and not torch.equal(unmasked, out)


def test_cross_attention_takes_queries_and_keys_apart():
    q, k, v = drawn(10, 30, kv_heads=2)
    centroids = torch.randn(4, 3, 8)
    found = routing_attention(q, k, v, centroids, cluster_size=10, selection="topw", causal=False)
    one = BalancedRouting(cluster_size=10, local_heads=0, **SIZES).build()
    one.clusters.centroids = centroids
    ctx = Context.of(q, k, causal=False)
    torch.testing.assert_close(found, one.reference(q, k, v, ctx))


def test_centroids_follow_the_running_means_of_what_is_nearest():
    torch.manual_seed(0)
    clusters = Clusters(2, 3, 4, decay=0.9).double()
    x = normal(torch.randn(2, 2, 7, 4, dtype=torch.float64))
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    mu = clusters.centroids.clone()
    clusters.observe(x, valid)
    assert torch.equal(clusters.centroids, mu), "nothing moves before it settles"
    clusters.settle()
    for h in range(2):
        sizes, sums = torch.ones(3, dtype=torch.float64) * 0.9, 0.9 * mu[h]
        for b in range(2):
            for i in range(7):
                if valid[b, i]:
                    c = int((mu[h] @ x[b, h, i]).argmax())
                    sizes[c] += 0.1
                    sums[c] = sums[c] + 0.1 * x[b, h, i]
        smooth = (sizes + 1e-5) / (sizes.sum() + 3e-5) * sizes.sum()
        torch.testing.assert_close(clusters.centroids[h], sums / smooth[:, None])
    moved = clusters.centroids.clone()
    clusters.settle()
    assert torch.equal(clusters.centroids, moved), "what was seen counts once"


def test_the_commitment_is_the_distance_from_the_nearest_centroid_and_pulls_there():
    clusters = Clusters(1, 3, 4).double()
    x = normal(torch.randn(2, 1, 6, 4, dtype=torch.float64)).requires_grad_()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    places = (x @ clusters.centroids[0].T).argmax(-1)
    apart = x - clusters.centroids[0][places]
    loss = clusters.commitment(x, valid)
    torch.testing.assert_close(loss, apart.square().mean(-1)[:, 0][valid].mean())
    loss.backward()
    assert (x.grad[1, 0, :2] == 0).all() and (x.grad * apart).sum() > 0


def test_lloyd_finds_planted_directions_and_waits_for_training():
    torch.manual_seed(0)
    spec = Routing(heads=1, width=16, local_heads=0, clusters=4, cluster_size=8, start="lloyd")
    attention = spec.build().eval()
    directions = torch.eye(16)[:4] * 4
    q = (directions[torch.arange(64) % 4] + 0.1 * torch.randn(64, 16))[None, None]
    noise = attention.clusters.centroids.clone()
    attention(q, q, q)
    assert torch.equal(attention.clusters.centroids, noise) and not attention.clusters.started
    attention.train()(q, q, q)
    assert attention.clusters.started
    like = torch.cosine_similarity(attention.clusters.centroids[0][:, None], normal(directions), dim=-1)
    assert like.amax(1).min() > 0.9 or like.amax(0).max() > 0.99
    again = spec.build()
    again.load_state_dict(attention.state_dict())
    assert again.clusters.started


def test_training_moves_centroids_and_evaluation_does_not():
    layer = MultiHeadAttention(32, 4, mechanism=Routing(clusters=4, decay=0.5))
    clusters, x = layer.mechanism.clusters, torch.randn(2, 50, 32)
    before = clusters.centroids.clone()
    layer.eval()(x)
    layer(x)
    assert torch.equal(clusters.centroids, before)
    layer.train()(x)
    assert torch.equal(clusters.centroids, before), "before the next forward"
    saved = layer.state_dict()["mechanism.clusters.centroids"]
    assert not torch.equal(saved, before), "what is saved has what was seen"
    frozen = MultiHeadAttention(32, 4, mechanism=Routing(clusters=4, decay=1.0))
    before = frozen.mechanism.clusters.centroids.clone()
    frozen(x), frozen(x)
    assert torch.equal(frozen.mechanism.clusters.centroids, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_once_and_gives_the_same_gradients(reentrant):
    torch.manual_seed(0)
    plain = MultiHeadAttention(16, 2, mechanism=BalancedRouting(clusters=4, cluster_size=8, decay=0.5))
    other, x = copy.deepcopy(plain), torch.randn(2, 30, 16, requires_grad=True)
    for _ in range(2):
        grads = []
        for layer, run in ((plain, plain), (other, lambda y: checkpoint(other, y, use_reentrant=reentrant))):
            layer.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in layer.parameters()])
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_in_bfloat16_the_centroids_stay_float32():
    layer = MultiHeadAttention(16, 2, mechanism=Routing(clusters=4)).bfloat16()
    layer(torch.randn(2, 30, 16).bfloat16())
    layer.mechanism.clusters.settle()
    assert {x.dtype for x in layer.mechanism.clusters.buffers()} == {torch.float32, torch.bool}


def test_the_commitment_loss_of_a_model_is_handed_out_once():
    layer = MultiHeadAttention(32, 4, mechanism="routing")
    with pytest.raises(RegardError, match="has run in training"):
        commitment_loss(layer)
    layer(torch.randn(2, 50, 32))
    loss = commitment_loss(layer)
    loss.backward()
    assert loss > 0 and layer.queries.weight.grad.abs().sum() > 0
    with pytest.raises(RegardError, match="take its commitment_loss once"):
        commitment_loss(layer)
    with pytest.raises(RegardError, match="Linear has no layer that routes"):
        commitment_loss(torch.nn.Linear(2, 2))


def test_steps_find_the_clusters_of_earlier_keys_where_they_kept_them(monkeypatch):
    attention = Routing(cluster_size=4, **SIZES).build().eval()
    q, k, v = drawn(30)
    whole, assigned, kept = attention(q, k, v), [], {}
    assign = RoutingHeads.assign
    monkeypatch.setattr(
        RoutingHeads, "assign", lambda self, k: assigned.append(k.shape[2]) or assign(self, k)
    )
    for start, stop in ((0, 10), (10, 13), *((n, n + 1) for n in range(13, 30))):
        now = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        out = attention(*now, replace(Context.of(*now[:2]), kept=kept))
        torch.testing.assert_close(out, whole[:, :, start:stop])
    assert assigned == [10, 3, *[1] * 17]


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_swapped_in_the_cache_changes_nothing(way):
    model = FAMILIES["llama"].build("sdpa").eval()
    inputs = prompt("llama", model, "left")
    beams = {name: value for name, value in way.items() if name == "num_beams"}
    spec = Routing(clusters=3, cluster_size=3, window=2, norm="l2")
    with regard.swap(model, spec) as session:
        expected, scores = generated(model, inputs, max_new_tokens=8, use_cache=False, **beams)
        found, others = generated(model, inputs, max_new_tokens=8, **way)
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModel, match="has parameters or centroids"):
        session.keep()
    with (
        regard.swap(model, BalancedRouting(clusters=3)),
        pytest.raises(UnsupportedModel, match="keys of a cache"),
    ):
        generated(model, inputs, max_new_tokens=3)


def test_planted_clusters_are_kept_by_learned_centroids_and_less_by_others():
    generator = torch.Generator().manual_seed(0)
    directions = normal(torch.randn(16, 64, generator=generator))
    noise = torch.randn(2, 1, 1, 512, 64, generator=generator)
    q, k = normal(directions[torch.arange(512) % 16] + noise)
    weights = (q @ k.transpose(2, 3)).softmax(-1)
    spec = BalancedRouting(heads=1, width=64, local_heads=0, clusters=16, cluster_size=48)
    torch.manual_seed(1)
    attention, mass = spec.build(), {}
    for name in ("random", "k-means"):
        if name == "k-means":
            attention.clusters.begin(torch.cat([q, k], 2))
        seen = attention.looked_at(q, k, Context.of(q, k, causal=False))(0, 512)
        mass[name] = float(kept_mass(weights, seen).mean())
    chance = torch.rand(1, 1, 512, 512, generator=generator).argsort(-1) < 48
    mass["lists"] = float(kept_mass(weights, chance).mean())
    assert mass["k-means"] > 0.8 and mass["random"] < 0.7 and mass["lists"] < 0.2, mass


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Routing(clusters=0), "clusters is 0"),
        (lambda: Routing(cluster_size=True), "cluster_size is True"),
        (lambda: Routing(clusters=3, nearest=4), "nearest is 4, of 3 clusters"),
        (lambda: Routing(heads=4, local_heads=5), "local_heads is 5, of 4 heads"),
        (lambda: Routing(window=0), "window is 0"),
        (lambda: Routing(decay=1.5), "decay is 1.5"),
        (lambda: Routing(norm="rms"), "layernorm or l2"),
        (lambda: Routing(start="zero"), "noise or lloyd"),
        (lambda: Routing(scale=0), "scale is 0"),
        (lambda: BalancedRouting(damping=-1), "damping is -1"),
        (lambda: Routing().build(), "needs heads"),
        (lambda: routing_attention(*drawn(5), torch.randn(3, 2, 8)), r"must be \[4 or 1, clusters, 8\]"),
        (lambda: routing_attention(*drawn(5), torch.randn(4, 2, 8), selection="best"), "causal or topw"),
        (lambda: routing_attention(*drawn(5), torch.randn(4, 2, 8), causal=False), "sees no later key"),
        (
            lambda: routing_attention(*drawn(5, 9), torch.randn(4, 2, 8), selection="topw"),
            "keys of a cache",
        ),
        (lambda: routing_attention(*drawn(5), torch.full((4, 2, 8), torch.nan)), "NaN or infinite"),
        (lambda: Routing(heads=3, width=8).build()(*drawn(5)), "built for 3 heads"),
        (
            lambda: BalancedRouting(**SIZES).build()(
                *drawn(5, 9), Context.of(*drawn(5, 9)[:2], causal=False)
            ),
            "give local_heads=0",
        ),
        (lambda: MultiHeadAttention(32, 4, mechanism="routing", causal=False), "only causal"),
        (
            lambda: MultiHeadAttention(32, 4, mechanism="balanced-routing").step(torch.randn(1, 3, 32)),
            "which queries a cluster takes",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said_in_a_sentence(make, told):
    with pytest.raises((RegardError, ShapeMismatch, UnsupportedModel), match=told):
        make()
