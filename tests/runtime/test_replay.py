"""Replays against full forwards, plain hooks, and one patch at a time."""

import itertools

import pytest
import torch

import regard
from regard import Point
from regard.errors import RegardError
from regard.lens.entropy import Entropy
from regard.runtime import Replay, collect
from regard.runtime.edits.scale import ScaleHeads
from regard.runtime.patch import Patch
from regard.runtime.protocol import Edit
from regard.runtime.row_patch import RowPatch
from regard.runtime.run import Run
from tests.support.families import valid
from tests.support.replayed import PADDINGS, close, forward, made, score, three_layers

OTHERS = ["falcon", "mixtral", "modernbert", "vit", "llava", "qwen2-vl", "gemma3-images", "deepseek"]
WIDTH = 8


@pytest.fixture(scope="module")
def model_and_inputs():
    return three_layers()


@pytest.fixture
def llama(model_and_inputs):
    return model_and_inputs[0]


@pytest.fixture
def inputs(model_and_inputs):
    return model_and_inputs[1]


@pytest.mark.parametrize("name", [*PADDINGS, *OTHERS])
def test_every_layer_gives_the_full_forward(name):
    model, inputs = made(name)
    expected = forward(model, inputs)
    replay = Replay(model, inputs)
    real = valid(inputs, expected.shape)
    assert close(replay.logits[real], expected[real])
    for layer in range(2):
        assert close(replay.run(layer), replay.logits)
        for part in replay.run(layer, batch=3).chunk(3):
            assert close(part[real], expected[real])


@pytest.mark.parametrize("name", [*PADDINGS, "llava", "qwen2-vl"])
def test_a_patch_gives_what_it_gives_in_a_full_forward(name):
    model, inputs = made(name)
    replay = Replay(model, inputs)
    for point in (Point("head", 1, head=2), Point("attention", 1, position=4), Point("residual_pre", 1)):
        with regard.patch(model, {point: 0.5}):
            expected = forward(model, inputs)
        assert close(replay.run(1, Patch({point: 0.5})), expected)
        assert not torch.allclose(expected, replay.logits, atol=1e-3)


def test_only_the_later_blocks_are_run(llama, inputs):
    ran = []
    replay = Replay(llama, inputs)
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(llama.model.layers)
    ]
    replay.run(1)
    for handle in handles:
        handle.remove()
    assert ran == [1, 2]


def test_images_are_not_looked_at_again():
    model, inputs = made("llava")
    replay, ran = Replay(model, inputs), []
    tower = [m for n, m in model.named_modules() if "vision" in n and n.endswith("self_attn")]
    handles = [m.register_forward_hook(lambda *_: ran.append(1)) for m in tower]
    replay.run(0)
    assert not ran
    replay.run("vision.1")
    assert len(ran) == 1
    for handle in handles:
        handle.remove()


def test_plain_hooks_at_a_head_of_each_row(llama, inputs):
    """Three heads' inputs to the output projection, each replaced in its own copy of the batch."""
    replay = Replay(llama, inputs)
    values = {Point("head", 1, head=h): torch.randn(2, 9, WIDTH) for h in (0, 2, 3)}
    rows = replay.run(1, RowPatch(list(values.items())), batch=3)
    for (point, value), found in zip(values.items(), rows.chunk(3), strict=True):

        def change(module, args, head=point.head, value=value):
            x = args[0].clone()
            x[..., head * WIDTH : (head + 1) * WIDTH] = value
            return (x,)

        handle = llama.model.layers[1].self_attn.o_proj.register_forward_pre_hook(change)
        expected = forward(llama, inputs)
        handle.remove()
        assert close(found, expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("mixtral", kind) for kind in ("residual_pre", "residual", "attention", "mlp")), ("opt", "mlp")],
)
def test_rows_of_every_kind_of_point(name, kind):
    """Those of OPT's MLP stand in one row, [B * T, D]."""
    model, inputs = made(name)
    replay = Replay(model, inputs)
    values = [lambda x: x + 1, lambda x: -x, 0.0]
    rows = replay.run(1, RowPatch([(Point(kind, 1), value) for value in values]), batch=3)
    for value, found in zip(values, rows.chunk(3), strict=True):
        with regard.patch(model, {Point(kind, 1): value}):
            assert close(found, forward(model, inputs))


def one_by_one(model, inputs, values):
    found = []
    for point, value in values.items():
        with regard.patch(model, {point: value}):
            found.append(float(score(forward(model, inputs))))
    return found


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_sweep_is_one_patch_at_a_time(llama, inputs, batch):
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    points = [
        Point("head", 2, head=1), Point("residual_pre", 1, position=5), Point("head", 0, head=3, position=-1),
        Point("embedding", position=4), Point("mlp", 2, position=8), Point("final_norm", position=8),
        Point("head", 2, head=0), Point("attention", 0), Point("logits", position=-1),
    ]  # fmt: skip
    values = collect(llama, other, points)
    found = Replay(llama, inputs).sweep(points, values, score, batch=batch)
    assert found == pytest.approx(one_by_one(llama, inputs, values), abs=2e-4)
    assert len({round(x, 3) for x in found}) > 6


def test_heads_in_a_table(llama, inputs):
    replay = Replay(llama, inputs)
    table = replay.sweep_heads(0.0, score, batch=5)
    grid = table.grid("effect")
    assert grid.shape == (3, 4)
    for layer, head in itertools.product(range(3), range(4)):
        (expected,) = one_by_one(llama, inputs, {Point("head", layer, head=head): 0.0})
        assert grid[layer, head] == pytest.approx(expected, abs=2e-4)
    assert table.about["unpatched"] == pytest.approx(float(score(forward(llama, inputs))), abs=1e-4)


def test_values_of_a_table_by_layer_number_or_alias(llama, inputs):
    replay = Replay(llama, inputs)
    by_number = {Point("head", 1, head=h): float(h) for h in range(4)}
    by_alias = {Point("head", "text.1", head=h): float(h) for h in range(4)}
    first = replay.sweep_heads(by_number, score, layers=[1])
    assert (
        first["effect"].tolist() == replay.sweep_heads(by_alias, score, layers=["text.1"])["effect"].tolist()
    )
    with pytest.raises(RegardError, match="nothing for it"):
        replay.sweep_heads(by_number, score)


def test_its_own_values_change_nothing(llama, inputs):
    replay = Replay(llama, inputs)
    own = collect(llama, inputs, replay.heads())
    table = replay.sweep_heads(own, score)
    assert table["effect"] == pytest.approx([table.about["unpatched"]] * 12, abs=1e-4)


def test_collected_values_are_what_plain_hooks_see(llama, inputs):
    kept = {}
    layer = llama.model.layers[1]
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: kept.update(heads=args[0])),
        layer.mlp.register_forward_hook(lambda m, args, out: kept.update(mlp=out)),
    ]
    points = [
        Point("head", 1, head=2),
        Point("head", "text.1", head=0, position=3),
        Point("mlp", 1, position=-2),
    ]
    found = collect(llama, inputs, points)
    for handle in handles:
        handle.remove()
    assert list(found) == points
    assert close(found[points[0]], kept["heads"][..., 2 * WIDTH : 3 * WIDTH])
    assert close(found[points[1]], kept["heads"][:, 3, :WIDTH])
    assert close(found[points[2]], kept["mlp"][:, -2])


def test_gradients_reach_patched_values(llama, inputs):
    point = Point("head", 1, head=1)
    values = [torch.randn(2, 9, WIDTH, requires_grad=True) for _ in range(2)]
    replay = Replay(llama, inputs)
    rows = replay.run(1, RowPatch([(point, value) for value in values]), batch=2, grad=True)
    found = torch.autograd.grad(sum(map(score, rows.chunk(2))), values)
    for value, grad in zip(values, found, strict=True):
        with regard.patch(llama, {point: value}):
            (expected,) = torch.autograd.grad(score(llama(**inputs).logits), value)
        assert close(grad, expected) and grad.abs().max() > 1e-3
    assert not replay.run(1, Patch({point: values[0]})).requires_grad


def test_rows_may_be_of_different_layers(llama, inputs):
    points = [Point("mlp", 1), Point("mlp", 2), Point("mlp", 2, position=4), Point("head", 1, head=0)]
    rows = Replay(llama, inputs).run(1, RowPatch([(point, 2.0) for point in points]), batch=4)
    for point, found in zip(points, rows.chunk(4), strict=True):
        with regard.patch(llama, {point: 2.0}):
            assert close(found, forward(llama, inputs))


def test_lenses_see_the_later_layers(llama, inputs):
    with regard.watch(llama, Entropy()) as seen, torch.no_grad():
        llama(**inputs)
    replay = Replay(llama, inputs)
    replay.run(1, [Entropy()])
    whole, part = seen[Entropy].table.columns, replay.session[Entropy].table.columns
    assert list(part["site"]) == ["text.1"] * 4 + ["text.2"] * 4
    for column in set(part) - {"site"}:
        assert list(part[column]) == pytest.approx(list(whole[column])[4:], abs=1e-5)


def test_edits_that_are_open_are_part_of_both(llama, inputs):
    edit = ScaleHeads({(0, 1): 0.0})
    with regard.steer(llama, edit, ScaleHeads({(2, 3): 3.0})):
        expected = forward(llama, inputs)
    with regard.steer(llama, edit):
        replay = Replay(llama, inputs)
        assert close(replay.run(1, ScaleHeads({(2, 3): 3.0})), expected)
    assert not close(expected, forward(llama, inputs))


def test_spans_are_repeated_with_the_batch(llama, inputs):
    seen = []

    class Look(Edit):
        def wants(self, call):
            seen.append(call.run.spans["facts"])

    span = torch.zeros(2, 9, dtype=torch.bool)
    span[1, 3:5] = True
    Replay(llama, inputs, spans={"facts": span}).run(2, Look(), batch=2)
    assert torch.equal(seen[-1], span.repeat(2, 1))


def test_the_last_logits_alone(llama, inputs):
    replay = Replay(llama, {**inputs, "logits_to_keep": 1})
    assert replay.logits.shape[1] == 1
    found = replay.run(1, RowPatch([(Point("mlp", 1), 0.0), (Point("mlp", 1), 1.0)]), batch=2)
    assert found.shape == (4, 1, 97)
    with regard.patch(llama, {Point("mlp", 1): 1.0}):
        assert close(found[2:], forward(llama, inputs)[:, -1:])


def test_a_row_patch_leaves_what_it_is_given():
    x = torch.ones(4, 9, 32)
    found = RowPatch([(Point("mlp", 0), 2.0), (Point("mlp", 1), 3.0)]).hidden(Point("mlp", 1), x, Run())
    assert found[:2].eq(1).all() and found[2:].eq(3).all() and x.eq(1).all()
