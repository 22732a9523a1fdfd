"""The layer of routing attention: shared queries, decoding, memories, training, refusals."""

import pytest
import torch

from regard.attention import RoutingAttention, commitment_loss
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.models.decoder import Decoder
from regard.objectives import auxiliary_loss, train
from regard.tasks.corpus import packaged

SIZES = {"clusters": 4, "cluster_size": 6, "window": 5}


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return RoutingAttention(16, 4, **{**SIZES, **options}).double()


def given(length=29, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 16, generator=generator, dtype=torch.float64)


def padded(length, side):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, {"left": slice(0, 9), "right": slice(length - 9, length), "middle": slice(8, 15)}[side]] = False
    return mask


OPTIONS = [
    {},
    {"share_qk": False},
    {"local_heads": 0},
    {"local_heads": 4},
    {"local_heads": 3, "positions": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("side", [None, "left", "right", "middle"])
def test_steps_give_what_the_whole_gives(options, side):
    made, x = layer(**options).eval(), given()
    mask = None if side is None else padded(29, side)
    whole, rows = made(x, mask), torch.ones(2, 29, dtype=torch.bool) if mask is None else mask
    for sizes in ([1] * 29, [10, 3, 16], [29]):
        parts, state, at = [], None, 0
        for size in sizes:
            now = slice(at, at + size)
            out, state = made.step(x[:, now], state, None if mask is None else mask[:, now])
            parts, at = [*parts, out], at + size
        torch.testing.assert_close(torch.cat(parts, 1)[rows], whole[rows])
    assert all(len(part) == 2 for part in state)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("selection", ["causal", "topw"])
def test_a_padded_batch_is_its_items(side, selection):
    made, x, mask = layer(selection=selection).eval(), given(), padded(29, side)
    out = made(torch.where(mask[..., None], x, 1e3 * x), mask)
    for item in range(2):
        alone = made(x[item : item + 1, mask[item]])
        torch.testing.assert_close(out[item : item + 1, mask[item]], alone)


def test_shared_queries_are_the_keys_of_the_cluster_heads_alone():
    made, x = layer(), given()
    assert made.keys.weight.shape == (8, 16) and layer(share_qk=False).keys.weight.shape == (16, 16)
    assert layer(local_heads=0).keys is None
    at = torch.arange(29)[None]
    q = made._queries(x, at)
    assert torch.equal(made._keys(x, at, q)[:, :2], q[:, :2])


def test_positions_turn_the_local_heads_alone():
    made, x, later = layer(), given(), torch.arange(29)[None] + 5
    q, moved = made._queries(x, later - 5), made._queries(x, later)
    assert torch.equal(q[:, :2], moved[:, :2]) and not torch.allclose(q[:, 2:], moved[:, 2:])


def test_it_reads_another_sequence_where_order_and_nearness_mean_nothing():
    made = layer(causal=False, local_heads=0)
    assert not made.share_qk and made.mechanism.balanced
    x, memory, mask = given(10), given(30, seed=2), padded(30, "right")
    out = made(x, mask, memory=memory)
    changed = torch.where(mask[..., None], memory, memory + 1)
    made.eval()
    torch.testing.assert_close(made(x, mask, memory=memory), made(x, mask, memory=changed))
    assert out.shape == (2, 10, 16) and not torch.allclose(made(x, mask, memory=memory + 1), out)
    with pytest.raises(RegardError, match="causal=False, share_qk=False and local_heads=0"):
        layer()(x, memory=memory)
    with pytest.raises(ShapeMismatch, match="memory is of 1 sequences"):
        made(x, memory=memory[:1])


def test_every_parameter_learns_and_the_commitment_joins():
    made = layer().float()
    loss = made(given().float()).square().mean() + 1e-4 * commitment_loss(made)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_training_adds_what_the_mechanisms_ask_for():
    spec = {"mechanism": "routing", "clusters": 3, "cluster_size": 8, "window": 8, "commitment": 0.5}
    torch.manual_seed(0)
    model = Decoder(256, dim=16, layers=2, heads=2, mechanism=spec)
    tokens = torch.randint(0, 256, (2, 30))
    model(tokens)
    parts = [layer.attention.mechanism.commitment for layer in model.layers]
    added = auxiliary_loss(model)
    torch.testing.assert_close(added, 0.5 * sum(parts))
    assert auxiliary_loss(model) is None and auxiliary_loss(torch.nn.Linear(2, 2)) is None
    before = model.layers[0].attention.mechanism.clusters.centroids.clone()
    log = train(model, packaged(256), steps=3, batch=2, length=32, windows=2)
    model.state_dict()
    assert len(log.losses) == 3 and auxiliary_loss(model) is None
    assert not torch.equal(model.layers[0].attention.mechanism.clusters.centroids, before)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: layer(local_heads=5), "local_heads is 5, of 4 heads"),
        (lambda: RoutingAttention(15, 4), "15, which 4 heads do not divide"),
        (lambda: RoutingAttention(16, 0), "heads is 0"),
        (lambda: layer(positions="alibi"), "rotary"),
        (lambda: layer(selection="all"), "causal or topw"),
        (lambda: layer(selection="causal", causal=False), "causal is False"),
        (lambda: layer(selection="topw").step(given()), "cannot decode step by step"),
        (lambda: layer(causal=False).step(given()), "cannot decode step by step"),
        (lambda: layer()(given()[..., :8]), r"x must be \[batch, time, 16\]"),
        (lambda: layer()(given(), torch.ones(2, 28, dtype=torch.bool)), r"mask must be bool \[2, 29\]"),
        (lambda: layer().step(given(1), layer().step(given(5, 1))[1]), "what step.. returned for 2"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(make, told):
    with pytest.raises((RegardError, ShapeMismatch, UnsupportedModel), match=told):
        make()
