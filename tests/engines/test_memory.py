"""Neural memories: chunks, blocks, pieces and steps against one position after the other."""

from itertools import pairwise

import pytest
import torch
from torch.func import grad, vmap

from regard.attention.dsf.formulas import titans_memory
from regard.engines.memory import apply, neural_memory
from regard.errors import RegardError, ShapeMismatch

B, H, T, N, D = 2, 2, 37, 4, 5
LAYERS = {1: (N, D), 2: (N, 6, D), 3: (N, 6, 6, D)}


def network(depth, scale=0.4):
    generator = torch.Generator().manual_seed(depth)
    sizes = LAYERS[depth]
    return tuple(
        scale * torch.randn(H, a, b, generator=generator, dtype=torch.float64) for a, b in pairwise(sizes)
    )


def inputs(length=T, step=0.3):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, B, H, length, N, generator=generator, dtype=torch.float64)
    v = torch.randn(B, H, length, D, generator=generator, dtype=torch.float64)
    theta, alpha, eta = torch.rand(3, B, H, length, generator=generator, dtype=torch.float64)
    return {
        "q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": v, "theta": step * theta, "alpha": 0.8 * alpha,
        "eta": 0.8 * eta,
    }  # fmt: skip


def naive(q, k, v, theta, alpha, eta, weights, chunk, activation="silu"):
    """The paper's equations, one position after the other, gradients by automatic differentiation."""

    def loss(weights, k, v):
        return (apply(weights, k[None], activation)[0] - v).square().sum()

    gradient = vmap(vmap(grad(loss)))
    weights = tuple(w.expand(B, *w.shape) for w in weights)
    start, surprise, outs = weights, tuple(torch.zeros_like(w) for w in weights), []
    for t in range(q.shape[2]):
        start = weights if chunk and t % chunk == 0 else start
        a, e, s = (0 if g is None else g[:, :, t, None, None] for g in (alpha, eta, theta))
        found = gradient(start, k[:, :, t], v[:, :, t])
        surprise = tuple(e * old - s * new for old, new in zip(surprise, found, strict=True))
        weights = tuple((1 - a) * w + new for w, new in zip(weights, surprise, strict=True))
        outs.append(apply(weights, q[:, :, t, None], activation)[:, :, 0])
    return torch.stack(outs, 2)


def cut(given, start, stop):
    return {name: None if x is None else x[:, :, start:stop] for name, x in given.items()}


def near(found, expected, bound=1e-10):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * max(1, expected.abs().max())


def safe(chunk, depth):
    return 0.3 / min(chunk or T, T) / depth**2


@pytest.mark.parametrize("chunk", [1, 3, 4, 16, 64, None])
@pytest.mark.parametrize("depth", LAYERS)
@pytest.mark.parametrize("gates", ["both", "alpha", "eta", "none"])
def test_chunks_and_pieces_are_the_sequential_definition(chunk, depth, gates):
    given, weights = inputs(step=safe(chunk, depth)), network(depth)
    given |= {name: None for name in ("alpha", "eta") if gates not in (name, "both")}
    expected = naive(**given, weights=weights, chunk=chunk)
    near(neural_memory(**given, weights=weights, chunk=chunk)[0], expected)
    for sizes in ([5, 1, 0, 20, 11], [1] * 6 + [31]):
        memory, outs, at = None, [], 0
        for size in sizes:
            piece = cut(given, at, at + size)
            out, memory = neural_memory(**piece, weights=weights, memory=memory, chunk=chunk)
            outs.append(out)
            at += size
        near(torch.cat(outs, 2), expected)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("depth", [1, 2])
def test_positions_that_are_not_filled_change_nothing_and_sequences_part(chunk, depth):
    given, weights = inputs(step=safe(chunk, depth)), network(depth)
    expected = naive(**given, weights=weights, chunk=chunk)
    filled = torch.tensor([9, T])
    out, memory = neural_memory(**given, weights=weights, chunk=chunk, filled=filled)
    near(out[0, :, :9], expected[0, :, :9])
    near(out[1], expected[1])
    assert memory.seen.tolist() == [9, T]
    late, _ = neural_memory(**cut(given, 9, 20), memory=memory, chunk=chunk)
    near(late[0], expected[0, :, 9:20])


@pytest.mark.parametrize("chunk", [1, 4])
def test_one_matrix_is_the_memory_of_the_dynamical_systems(chunk):
    given = inputs()
    out, _ = neural_memory(**given, chunk=chunk)
    for b in range(B):
        for h in range(H):
            q, k, v, theta, alpha, eta = (x[b, h] for x in given.values())
            near(out[b, h], titans_memory(q, k, v, theta, alpha, eta, chunk))


@pytest.mark.parametrize(("depth", "chunk"), [(1, 1), (1, 2), (2, 3), (2, 1)])
def test_gradients_are_those_of_finite_differences(depth, chunk):
    given = {name: x[:1, :1] for name, x in inputs(5, 0.1).items()}
    weights = tuple(w[:1].requires_grad_() for w in network(depth))
    tensors = [x.clone().requires_grad_() for x in given.values()]

    def outcome(*tensors):
        named = dict(zip(given, tensors[: len(given)], strict=True))
        out, memory = neural_memory(**named, weights=tensors[len(given) :], chunk=chunk)
        return out, *memory.weights

    assert torch.autograd.gradcheck(outcome, (*tensors, *weights), atol=1e-6)


def test_the_first_order_answers_the_same_and_stops_gradients_of_keys():
    given, weights = inputs(step=0.05), network(2)
    given["k"].requires_grad_()
    whole, _ = neural_memory(**given, weights=weights, chunk=4)
    first, _ = neural_memory(**given, weights=weights, chunk=4, second_order=False)
    near(first, whole)
    assert whole.requires_grad and not first.requires_grad
    with torch.no_grad():
        near(neural_memory(**given, weights=weights, chunk=4)[0], whole)


def test_gates_of_zero_and_one_give_numbers_and_gradients():
    given = inputs(step=0.05)
    for name, places in (("eta", {3: 0.0, 9: 1.0}), ("alpha", {5: 1.0, 9: 0.0}), ("theta", {7: 0.0})):
        for place, value in places.items():
            given[name][:, :, place] = value
    for depth, chunk in ((1, 4), (2, 4), (2, 1)):
        tensors = {name: x.clone().requires_grad_() for name, x in given.items()}
        out, _ = neural_memory(**tensors, weights=network(depth), chunk=chunk)
        near(out, naive(**given, weights=network(depth), chunk=chunk))
        found = torch.autograd.grad(out.sum(), list(tensors.values()))
        assert all(torch.isfinite(x).all() for x in found)


def test_float32_is_near_float64_over_a_long_sequence():
    given = inputs(600, 0.02)
    low = {name: x.float() for name, x in given.items()}
    for depth in (1, 2):
        exact, _ = neural_memory(**given, weights=network(depth), chunk=16)
        out, _ = neural_memory(**low, weights=network(depth), chunk=16)
        assert out.dtype == torch.float32
        near(out.double(), exact, 1e-5)


def test_a_memory_that_diverges_is_named_with_layer_and_position():
    """The same keys all over: steps above 1 / chunk are not safe, and those below are."""
    given = inputs(256, 0.0) | {"alpha": None, "eta": None}
    given["k"] = given["k"][:, :, :1].expand(-1, -1, 256, -1)
    whole = torch.ones_like(given["theta"])
    for depth in (1, 2):
        with pytest.raises(RegardError, match=r"diverged: a weight of its layer \d reached .* after \d+ pos"):
            neural_memory(**given | {"theta": 0.5 * whole}, weights=network(depth), chunk=16)
        neural_memory(**given | {"theta": 0.5 / 16 * whole}, weights=network(depth), chunk=16)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"chunk": 0}, RegardError, "chunk is 0"),
        ({"chunk": 2.5}, RegardError, "chunk is 2.5"),
        ({"activation": "step"}, RegardError, "one of silu, gelu"),
        ({"k": torch.zeros(B, H, T, N + 1)}, ShapeMismatch, r"q and k must be \[B, H, T, n\]"),
        ({"theta": torch.zeros(B, H, T + 1)}, ShapeMismatch, r"theta must be \[2, 2, 37\]"),
        ({"filled": torch.zeros(B + 1, dtype=torch.int64)}, ShapeMismatch, r"filled must be \[2\]"),
        ({"v": torch.full((B, H, T, D), torch.nan)}, RegardError, "v holds a number that is not finite"),
        ({"weights": (torch.zeros(H, N, D + 1),)}, ShapeMismatch, "from 4 to 5"),
        ({"weights": (torch.zeros(H + 1, N, D),)}, ShapeMismatch, "one .* a layer"),
    ],
)
def test_bad_input_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        neural_memory(**inputs() | change)


def test_a_memory_of_other_sequences_or_gates_is_refused():
    given = inputs()
    _, memory = neural_memory(**given)
    with pytest.raises(ShapeMismatch, match="the state is of"):
        neural_memory(**{name: x[:1] for name, x in given.items()}, memory=memory)
    with pytest.raises(ShapeMismatch, match="begun with momentum"):
        neural_memory(**given | {"eta": None}, memory=memory)
