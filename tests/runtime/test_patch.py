"""patch against plain hooks on the modules that the points stand for."""

from contextlib import contextmanager

import pytest
import torch

import regard
from regard import Point
from regard.runtime import Edit, Lens
from tests.support.families import FAMILIES

WIDTH = 8
PLACES = {
    "embedding": lambda m: (m.model.embed_tokens, "output"),
    "residual_pre": lambda m: (m.model.layers[1], "input"),
    "residual": lambda m: (m.model.layers[1], "output"),
    "attention": lambda m: (m.model.layers[1].self_attn.o_proj, "output"),
    "mlp": lambda m: (m.model.layers[1].mlp, "output"),
    "final_norm": lambda m: (m.model.norm, "output"),
    "logits": lambda m: (m.lm_head, "output"),
}
ONCE = ("embedding", "final_norm", "logits")


def point(kind, **options):
    return Point(kind, None if kind in ONCE else 1, **options)


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


@contextmanager
def hooked(model, kind, change):
    """Change the tensor at a place by a plain hook."""
    module, side = PLACES[kind](model)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, out: in_first(change, out))
    try:
        yield
    finally:
        handle.remove()


def in_first(change, out):
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def patched(model, inputs, values):
    with regard.patch(model, values):
        return logits(model, inputs)


def held(model, inputs, kind):
    """What is at a place."""
    kept = []

    def keep(x):
        kept.append(x.detach().clone())
        return x

    with hooked(model, kind, keep):
        logits(model, inputs)
    return kept[0]


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_kind_of_point_takes_a_tensor(name, kind):
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "left")
    value = torch.randn_like(held(model, inputs, kind))
    with hooked(model, kind, lambda x: value):
        expected = logits(model, inputs)
    found = patched(model, inputs, {point(kind): value})
    assert torch.equal(found, expected)
    assert not torch.allclose(found, logits(model, inputs), atol=1e-3)


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("position", [2, -1])
def test_one_position_of_every_kind(llama, kind, position):
    inputs = FAMILIES["llama"].inputs(llama)
    value = torch.randn_like(held(llama, inputs, kind)[:, 0])

    def change(x):
        x = x.clone()
        x[:, position] = value
        return x

    with hooked(llama, kind, change):
        expected = logits(llama, inputs)
    assert torch.equal(patched(llama, inputs, {point(kind, position=position): value}), expected)


@pytest.mark.parametrize("kind", PLACES)
def test_a_function_gets_what_is_there(llama, kind):
    inputs = FAMILIES["llama"].inputs(llama)
    with hooked(llama, kind, lambda x: 2 * x + 1):
        expected = logits(llama, inputs)
    assert torch.equal(patched(llama, inputs, {point(kind): lambda x: 2 * x + 1}), expected)


@pytest.mark.parametrize("kind", [*PLACES, "head"])
def test_the_points_own_value_changes_nothing(llama, kind):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    where = Point("head", 1, head=2) if kind == "head" else point(kind)
    own = head_inputs(llama, inputs)[:, :, 2] if kind == "head" else held(llama, inputs, kind)
    with regard.watch(llama):
        expected = logits(llama, inputs)
    assert torch.allclose(patched(llama, inputs, {where: own}), expected, atol=1e-5)
    assert torch.equal(patched(llama, inputs, {where: lambda x: x}), expected)


def head_inputs(model, inputs, layer=1):
    """What the output projection is fed, by head: [B, T, H, Dv]."""
    kept = []
    projection = model.model.layers[layer].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    logits(model, inputs)
    handle.remove()
    return kept[0].unflatten(-1, (4, WIDTH))


@contextmanager
def columns(model, change, layer=1):
    """Change what the output projection is fed, by head: [B, T, H, Dv]."""

    def hook(module, args):
        x = args[0].unflatten(-1, (4, WIDTH)).clone()
        change(x)
        return (x.flatten(-2),)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_heads_are_returning_the_projection(llama):
    """Activation patching: head 2 gives what it gave on other tokens, head 3 a number at one position."""
    inputs = FAMILIES["llama"].inputs(llama, "left")
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    before = head_inputs(llama, other)[:, :, 2]

    def change(x):
        x[:, :, 2] = before
        x[:, 4, 3] = 0.5

    with columns(llama, change):
        expected = logits(llama, inputs)
    values = {Point("head", 1, head=2): before, Point("head", "text.1", head=3, position=4): 0.5}
    found = patched(llama, inputs, values)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(llama, inputs), atol=1e-3)


@pytest.mark.parametrize("shape", [(), (WIDTH,), (9, WIDTH), (2, 1, WIDTH)])
def test_values_broadcast(llama, shape):
    inputs = FAMILIES["llama"].inputs(llama)
    value = torch.randn(shape)
    whole = value.expand(2, 9, WIDTH)
    expected = patched(llama, inputs, {Point("head", 0, head=1): whole})
    assert torch.equal(patched(llama, inputs, {Point("head", 0, head=1): value}), expected)


def test_values_take_the_models_dtype(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    value = torch.ones(32, dtype=torch.float64)
    expected = patched(llama, inputs, {point("mlp"): 1})
    assert torch.equal(patched(llama, inputs, {point("mlp"): value}), expected)


@pytest.mark.parametrize("where", [point("residual", position=3), Point("head", 0, head=1, position=3)])
def test_gradients_reach_the_value(llama, where):
    inputs = FAMILIES["llama"].inputs(llama)
    value = torch.randn(2, WIDTH if where.kind == "head" else 32, requires_grad=True)

    def loss():
        with regard.patch(llama, {where: value}):
            return llama(**inputs).logits.square().mean()

    (grad,) = torch.autograd.grad(loss(), value)
    direction, ends = torch.randn_like(value), []
    for step in (1e-2, -2e-2):
        with torch.no_grad():
            value += step * direction
            ends.append(loss().item())
    assert (grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_heads_by_their_alias(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, "left")
    projection = model.get_submodule(
        "decoder.block.0.layer.1.EncDecAttention.o" if name == "t5" else
        "model.decoder.layers.0.encoder_attn.out_proj"
    )  # fmt: skip

    def change(module, args):
        x = args[0].clone()
        x[:, 3, WIDTH : 2 * WIDTH] = 0
        return (x,)

    handle = projection.register_forward_pre_hook(change)
    expected = logits(model, inputs)
    handle.remove()
    found = patched(model, inputs, {Point("head", "cross.0", head=1, position=3): 0.0})
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(model, inputs), atol=1e-4)


class Fed(Lens):
    """Keeps what is at a point of each forward, and what each head of a layer gives."""

    def points(self, anatomy):
        return [Point("residual", 0)]

    def hidden(self, point, x, run):
        run_kept.append(x.clone())

    def head_outputs(self, call):
        if call.site.alias == "text.0":
            heads_kept.append(call.head_outputs.clone())


run_kept, heads_kept = [], []


@pytest.fixture(autouse=True)
def emptied():
    run_kept.clear()
    heads_kept.clear()


def test_lenses_see_what_is_patched(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    values = {Point("residual", 0, position=1): 7.0, Point("head", 0, head=1): 3.0}
    with regard.watch(llama, Fed()), regard.patch(llama, values):
        logits(llama, inputs)
    assert torch.equal(run_kept[0][:, 1], torch.full((2, 32), 7.0))
    assert run_kept[0][:, 2].std() > 0.1
    assert torch.equal(heads_kept[0][:, 1], torch.full((2, 9, WIDTH), 3.0))


def test_a_lens_before_sees_what_was_there(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with regard.watch(llama, Fed(before=True)), regard.patch(llama, {Point("residual", 0): 7.0}):
        logits(llama, inputs)
    assert torch.allclose(run_kept[0], held_at(llama, inputs), atol=1e-5)


def held_at(model, inputs):
    kept = []
    handle = model.model.layers[0].register_forward_hook(lambda m, args, out: kept.append(out))
    logits(model, inputs)
    handle.remove()
    return kept[0]


def test_patches_apply_in_the_order_given(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    first, second = {point("mlp"): 2.0}, {point("mlp"): lambda x: x + 1}
    with regard.patch(llama, first), regard.patch(llama, second):
        found = logits(llama, inputs)
    assert torch.equal(found, patched(llama, inputs, {point("mlp"): 3.0}))
    with regard.patch(llama, second), regard.patch(llama, first):
        found = logits(llama, inputs)
    assert torch.equal(found, patched(llama, inputs, {point("mlp"): 2.0}))


@pytest.mark.parametrize("where", [point("residual", position=-2), Point("head", 0, head=1, position=-2)])
def test_generating_patches_a_position_in_the_prefill_only(llama, where):
    """The first token is that of a patched forward; decoding goes on from its cache."""
    inputs = FAMILIES["llama"].inputs(llama, "left")
    value, ids, mask = 3.0, inputs["input_ids"], inputs["attention_mask"]
    with regard.patch(llama, {where: value}):
        found = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        with regard.patch(llama, {where: value}):
            first = (mask.cumsum(1) - 1).clamp_min(0)
            out = llama(**inputs, position_ids=first, use_cache=True)
        for _ in range(4):
            new = out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            positions = mask.cumsum(1)[:, -1:] - 1
            out = llama(
                input_ids=new, attention_mask=mask, position_ids=positions,
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
    assert torch.equal(found, ids)


def test_generating_patches_every_step_without_a_position(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    values = {Point("residual", 0): lambda x: x + 2.0, Point("head", 1, head=1): 0.0}
    with regard.watch(llama, Fed()), regard.patch(llama, {**values, Point("head", 0, head=3): 0.0}):
        found = llama.generate(**inputs, max_new_tokens=4, do_sample=False)
        again = llama.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(found, again)
    assert [len(x[0, 0]) for x in heads_kept[:4]] == [9, 1, 1, 1]
    assert all(x[:, 3].abs().max() == 0 and x[:, 2].abs().max() > 0 for x in heads_kept)


def test_the_model_is_as_it_was_after(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    before = logits(llama, inputs)
    with pytest.raises(ZeroDivisionError), regard.patch(llama, {point("mlp"): lambda x: x / (1 // 0)}):
        logits(llama, inputs)
    assert torch.equal(logits(llama, inputs), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_a_patch_is_an_edit_beside_others(llama):
    class Louder(Edit):
        def head_outputs(self, call):
            return 2 * call.head_outputs

    inputs = FAMILIES["llama"].inputs(llama)
    with columns(llama, lambda x: x[:, :, 1].fill_(2.0)), columns(llama, lambda x: x.mul_(1.0)):
        expected = logits(llama, inputs)
    with regard.steer(llama, Louder()), regard.patch(llama, {Point("head", 1, head=1): 2.0}):
        found = logits(llama, inputs)
    assert not torch.allclose(found, expected, atol=1e-3)
    with regard.patch(llama, {Point("head", 1, head=1): 1.0}), regard.steer(llama, Louder()):
        assert torch.allclose(logits(llama, inputs), found, atol=1e-5)
