"""Gradients through edits, none through lenses, and hidden states at points."""

import pytest
import torch

import regard
from regard.runtime import Edit, Lens, Point
from tests.support.families import FAMILIES
from tests.support.stages import Rows, run


def build(name="llama"):
    return FAMILIES[name].build().requires_grad_(False)


class Scaled(Edit):
    """Multiplies what one method sees by a number that takes gradients."""

    def __init__(self, method, factor):
        super().__init__()
        object.__setattr__(self, "factor", factor)
        object.__setattr__(self, method, getattr(self, f"change_{method}"))

    def change_inputs(self, call):
        return call.q * self.factor, call.k, call.v

    def change_scores(self, block):
        return block.scores * self.factor

    def change_weights(self, block):
        return block.weights * self.factor

    def change_head_outputs(self, call):
        return call.head_outputs * self.factor

    def change_attend(self, call, inner):
        return inner(call) * self.factor

    def change_hidden(self, point, x, run):
        return x * self.factor

    def points(self, anatomy):
        return [Point("attention", 0), Point("mlp", 1)] if hasattr(self, "hidden") else []


METHODS = ["inputs", "scores", "weights", "head_outputs", "attend", "hidden"]


def value(model, name, factor, method, *others):
    with regard.steer(model, Scaled(method, factor), *others):
        out = model(**FAMILIES[name].inputs(model))
    return out[0].double().square().mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mistral", "falcon"])
def test_gradients_flow_through_edits(name, method):
    """By finite differences, with rows opened or not, and with a lens watching."""
    model = build(name).double()
    factor = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(value(model, name, factor, method), factor)
    (watched,) = torch.autograd.grad(value(model, name, factor, method, Rows()), factor)
    with torch.no_grad():
        step = 2e-2
        high, low = (value(model, name, factor + sign * step, method) for sign in (1, -1))
        further = [value(model, name, factor + sign * 2 * step, method) for sign in (1, -1)]
    expected = (8 * (high - low) - (further[0] - further[1])) / (12 * step)
    assert found.abs() > 1e-4
    assert torch.allclose(found, expected, rtol=2e-2)
    assert torch.allclose(found, watched, rtol=1e-3)


def nodes(tensor):
    """How many steps autograd has recorded for a tensor."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return len(seen)


class Kept(Lens):
    """Keeps what it is shown as it is."""

    def points(self, anatomy):
        return [Point("residual", 0)]

    def hidden(self, point, x, run):
        object.__setattr__(self, "stream", x * 1)

    def weights(self, block):
        object.__setattr__(self, "last", block.weights * 1)

    def head_outputs(self, call):
        object.__setattr__(self, "out", call.head_outputs * 1)

    def result(self):
        return self.last, self.out, self.stream


class Differentiable(Kept):
    differentiable = True


def test_a_lens_adds_nothing_to_the_graph():
    model = build().requires_grad_(True)
    inputs = FAMILIES["llama"].inputs(model)
    with regard.watch(model):
        plain = nodes(model(**inputs).logits)
    with regard.watch(model, Rows(), Kept()) as seen:
        assert nodes(model(**inputs).logits) == plain
    assert not any(x.requires_grad for x in seen[Kept])


def test_a_differentiable_lens_is_part_of_the_graph():
    model = build().requires_grad_(True)
    with regard.watch(model, Differentiable()) as seen:
        model(**FAMILIES["llama"].inputs(model))
    projection = model.model.layers[1].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(seen[Differentiable][0][:, :, :, 0].sum(), projection)
    assert gradient.abs().max() > 1e-4


class Streams(Lens):
    """Keeps the tensor at every point asked for."""

    def __init__(self, *points, **options):
        super().__init__(**options)
        object.__setattr__(self, "asked", points)

    def points(self, anatomy):
        return self.asked

    def hidden(self, point, x, run):
        self.tally.append(PLACE, point.kind, x.clone())

    def result(self):
        return {point.kind: self.tally.get(point.kind)["text.1"] for point in self.asked}


class PLACE:
    alias, kind, layer, name = "text.1", "text", 1, "model.layers.1"


POINTS = [
    Point("embedding"), Point("residual_pre", 1), Point("attention", 1), Point("mlp", 1),
    Point("residual", 1), Point("final_norm"), Point("logits"),
]  # fmt: skip


def test_hidden_states_at_points():
    model = build()
    with torch.no_grad():
        out = model(**FAMILIES["llama"].inputs(model), output_hidden_states=True)
    with regard.watch(model, Streams(*POINTS)) as seen:
        run(model)
    found = {kind: kept[0] for kind, kept in seen[Streams].items()}
    assert {kind: len(kept) for kind, kept in seen[Streams].items()} == {p.kind: 1 for p in POINTS}
    expected = {
        "embedding": out.hidden_states[0], "residual_pre": out.hidden_states[1],
        "final_norm": out.hidden_states[2], "logits": out.logits,
    }  # fmt: skip
    for kind, value in expected.items():
        assert torch.allclose(found[kind], value, atol=1e-5), kind
    added = found["residual_pre"] + found["attention"] + found["mlp"]
    assert torch.allclose(added, found["residual"], atol=1e-5)
    assert torch.allclose(model.model.norm(found["residual"]), found["final_norm"], atol=1e-5)


def test_edits_of_a_point_compose_and_lenses_see_the_result():
    model = build()

    class Change(Edit):
        def __init__(self, function):
            super().__init__()
            object.__setattr__(self, "function", function)

        def points(self, anatomy):
            return [Point("mlp", 1)]

        def hidden(self, point, x, run):
            return self.function(x)

    lenses = [Streams(Point("mlp", 1), name="late"), Streams(Point("mlp", 1), name="early", before=True)]
    edits = [Change(lambda x: x + 1), Change(lambda x: x * 2), Change(lambda x: None)]
    with regard.steer(model, lenses[0], *edits, lenses[1]) as seen:
        run(model)
    early, late = seen["early"]["mlp"][0], seen["late"]["mlp"][0]
    assert torch.allclose(late, (early + 1) * 2)
    with regard.watch(model, Streams(Point("mlp", 1))) as seen:
        run(model)
    assert torch.allclose(seen[Streams]["mlp"][0], early, atol=1e-6)


def test_layers_narrow_what_a_lens_sees():
    model = build()
    everywhere = [Point("residual", 0), Point("embedding"), Point("mlp", 1)]
    with regard.watch(model, Rows(), Streams(*everywhere), layers=[1]) as seen:
        run(model)
    assert seen[Rows] == {"text.1": 1}
    kept = {p.kind: seen.lenses["Streams"].tally.get(p.kind) for p in everywhere}
    assert [kind for kind, found in kept.items() if found] == ["embedding", "mlp"]
