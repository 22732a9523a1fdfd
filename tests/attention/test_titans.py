"""Titans' layers: cut anywhere, padded, decoded, saved, trained; what MAC may see; what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from regard.attention import NeuralMemory, Titans, get
from regard.attention.dsf import to_ltv
from regard.errors import NotLinear, RegardError, ShapeMismatch
from regard.models.decoder import Decoder

SPECS = [*NeuralMemory.examples(), *Titans.examples()]
LENGTH = 17
named = pytest.mark.parametrize("spec", SPECS, ids=repr)


def built(spec):
    torch.manual_seed(0)
    return spec.build().double(), torch.randn(3, LENGTH, spec.dim, dtype=torch.float64)


def stepped(layer, x, sizes, valid=None, state=None):
    outs, at = [], 0
    for size in sizes:
        known = None if valid is None else valid[:, at : at + size]
        out, state = layer.step(x[:, at : at + size], state, known)
        outs.append(out)
        at += size
    return torch.cat(outs, 1), state


def near(found, expected, bound=1e-9):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < bound


@named
def test_pieces_are_the_whole(spec):
    layer, x = built(spec)
    for sizes in ([1] * LENGTH, [5, 3, 9], [0, 16, 0, 1]):
        near(stepped(layer, x, sizes)[0], layer(x))


PADDED = {
    "left": [slice(0, 6), slice(0, 1), slice(0, 0)],
    "right": [slice(6, LENGTH), slice(0, 0), slice(16, LENGTH)],
    "middle": [slice(4, 9), slice(0, 0), slice(8, 9)],
}


@named
@pytest.mark.parametrize("side", PADDED)
def test_a_padded_batch_is_its_items_one_by_one(spec, side):
    layer, x = built(spec)
    valid = torch.ones(3, LENGTH, dtype=torch.bool)
    for row, hidden in enumerate(PADDED[side]):
        valid[row, hidden] = False
    dirty = torch.where(valid[..., None], x, 1e3)
    for sizes in ([LENGTH], [5, 12], [9, 1, 1, 6]):
        out, _ = stepped(layer, dirty, sizes, valid)
        for row in range(3):
            near(out[row, valid[row]], layer(x[row : row + 1, valid[row]])[0])


@named
def test_the_state_keeps_its_size_and_goes_through_a_file(spec, tmp_path):
    layer, x = built(spec)
    whole = layer(x)
    _, early = stepped(layer, x[:, :3], [3])
    _, state = stepped(layer, x[:, :12], [12])
    assert [t.shape for t in early] == [t.shape for t in state]
    save_file({f"{i:03}": t.detach().contiguous().clone() for i, t in enumerate(state)}, tmp_path / "state")
    kept = load_file(tmp_path / "state")
    again = tuple(kept[name] for name in sorted(kept))
    near(layer.step(x[:, 12:], again)[0], whole[:, 12:])
    chosen = tuple(t.index_select(0, torch.tensor([2, 0, 2])) for t in state)
    near(layer.step(x[[2, 0, 2], 12:], chosen)[0], whole[[2, 0, 2], 12:])


def test_rows_are_begun_anew():
    layer, x = built(NeuralMemory(dim=8, heads=2, chunk_size=4))
    _, state = layer.step(x[:, :9])
    state = layer.reset(state, torch.tensor([False, True, False]))
    out, _ = layer.step(x[:, 9:], state)
    near(out[0], layer(x)[0, 9:])
    near(out[1], layer(x[:, 9:])[1])


def test_reading_writes_nothing_and_sees_what_was_written():
    layer, x = built(NeuralMemory(dim=8, heads=2, chunk_size=4))
    _, state = layer.step(x[:, :9])
    before = [t.clone() for t in state]
    found = layer.read(x[:, 9:], state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert (found - layer.read(x[:, 9:])).abs().max() > 1e-3
    still = NeuralMemory(dim=8, heads=2, chunk_size=4, max_step=1e-12, forget=False).build().double()
    still.load_state_dict({n: p for n, p in layer.state_dict().items() if "gates.forget" not in n})
    near(still.read(x), still(x), 1e-8)


@pytest.mark.parametrize("persistent", [0, 2])
def test_context_sees_the_memory_from_before_its_segment_and_nothing_later(persistent):
    spec = Titans(dim=8, heads=2, window=4, chunk_size=2, persistent=persistent)
    layer, x = built(spec)
    read = []
    recall = layer.memory.recall
    layer.memory.recall = lambda x, weights: read.append((x, weights)) or recall(x, weights)
    layer(x)
    assert [len(x[0]) for x, _ in read] == [4, 4, 4, 4, 1]
    first = tuple(layer.memory.weights)
    for a, b in zip(read[0][1], first, strict=True):
        assert torch.equal(a[0], b)
    _, before = layer.step(x[:, :8])
    depth = spec.depth
    now = before[-2 * depth : -depth]  # start, weights, surprise of each layer
    for a, b in zip(read[2][1], now, strict=True):
        near(a, b)


def test_attention_alone_forgets_what_left_its_window_and_memory_does_not():
    layer, x = built(Titans(dim=8, heads=2, variant="mag", window=4, chunk_size=2))
    changed = torch.cat([x[:, :1] + 1, x[:, 1:]], 1)

    def attention(x):
        return layer.attention.step(x, None)[0]

    moved = (attention(x) - attention(changed)).abs().amax((0, 2))
    assert moved[3] > 1e-4 and moved[4:].max() == 0
    assert (layer(x) - layer(changed))[:, 8:].abs().max() > 1e-5


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_persistent_tokens_are_seen_by_every_position(variant):
    layer, x = built(Titans(dim=8, heads=2, variant=variant, window=32, chunk_size=2))
    tokens = layer.persistent if variant != "mag" else layer.attention.persistent
    found = torch.autograd.grad(layer(x)[:, -1].square().sum(), tokens)[0]
    assert (found.abs().sum(-1) > 0).all()


def test_a_memory_of_one_matrix_is_a_dynamical_system():
    layer, x = built(NeuralMemory(dim=8, heads=2, depth=1, chunk_size=1))
    with pytest.raises(NotLinear, match="at first is not zero"):
        to_ltv(layer, x)
    torch.nn.init.zeros_(layer.memory.weights[0])
    system, u = to_ltv(layer, x)
    answers, _ = layer.memory.mix(x, None)
    near(system.simulate(u).transpose(1, 2).flatten(2), answers)
    deep, x = built(NeuralMemory(dim=8, heads=2, depth=2, chunk_size=1))
    for weight in deep.memory.weights:
        torch.nn.init.zeros_(weight)
    with pytest.raises(NotLinear, match="2 layers"):
        to_ltv(deep, x)


@pytest.mark.parametrize("name", ["neural-memory", "titans"])
def test_a_language_model_trains_and_decodes(name):
    torch.manual_seed(0)
    model = Decoder(20, dim=16, layers=2, heads=2, mechanism=name)
    tokens = torch.randint(0, 20, (4, 40), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    longer = model.generate(tokens[:, :5], 6)
    with torch.no_grad():
        chosen = model(longer[:, :-1]).argmax(-1)[:, 4:]
    assert torch.equal(chosen, longer[:, 5:])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("neural-memory", {"chunk_size": 0}, "chunk_size is 0"),
        ("neural-memory", {"depth": 0}, "depth is 0"),
        ("neural-memory", {"heads": 3}, "3 heads do not divide"),
        ("neural-memory", {"activation": "relu"}, "silu, gelu"),
        ("neural-memory", {"max_step": 0}, "max_step is 0"),
        ("neural-memory", {"momentum": 1}, "momentum is 1"),
        ("neural-memory", {"convolution": -1}, "convolution is -1"),
        ("titans", {"variant": "max"}, "mac, mag, mal"),
        ("titans", {"window": 0}, "window is 0"),
        ("titans", {"persistent": -1}, "persistent is -1"),
        ("titans", {"heads": 8}, "must be even"),
    ],
)
def test_bad_options_are_refused(name, options, words):
    with pytest.raises(RegardError, match=words):
        get(name, **{"dim": 8, "heads": 2} | options)


@named
def test_bad_input_is_refused(spec):
    layer, x = built(spec)
    _, state = layer.step(x)
    with pytest.raises(ShapeMismatch, match=r"x must be floating-point \[batch, time, \d\]"):
        layer(x[..., :-1])
    with pytest.raises(RegardError, match="not finite"):
        layer(x * torch.nan)
    with pytest.raises(ShapeMismatch, match="the state has tensors"):
        layer.step(x[:2], state)
    with pytest.raises(ShapeMismatch, match="the state has tensors"):
        layer.step(x, state[:-1])
    with pytest.raises(RegardError, match="what step"):
        layer.step(x, {"a": 1})
    with pytest.raises(RegardError, match="float32"):
        layer.step(x, tuple(t.float() if t.is_floating_point() else t for t in state))
    with pytest.raises(ShapeMismatch, match="valid must be bool"):
        layer.step(x, None, torch.ones(3, LENGTH))
