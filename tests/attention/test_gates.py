"""Gates of heads: as a layer, as part of a model, and what they refuse."""

import copy
import pickle

import pytest
import torch

from regard.attention import Gated
from regard.attention.gated import gated_attention
from regard.attention.gates import HeadGate
from regard.attention.placed_gates import PlacedGate, add_gates, remove_gates
from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from tests.attention.models import assert_same, differ, generated, outputs, prompt
from tests.support.families import FAMILIES

KINDS = ("linear", "mlp", "joint", "constant")
each = pytest.mark.parametrize("kind", KINDS)


@each
def test_a_gate_begins_where_it_is_told(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24)
    gate = HeadGate(24, 3, kind=kind, start=0.25)
    torch.testing.assert_close(gate(0 * x).mean(), torch.tensor(0.25), atol=0.1, rtol=0)
    tuned = HeadGate(24, 3, kind=kind, start=0.25, fine_tune=True)
    torch.testing.assert_close(tuned(x), torch.ones(2, 3, 5, 1), atol=0.02, rtol=0)
    assert tuned.factor == 4 and bool((gate(1e3 * x) <= 1).all())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_head_reads_its_own_slice_and_joint_reads_all(kind):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 24)
    other = x.clone()
    other[..., 8:16] += 1
    for chosen, moved in ((kind, [False, True, False]), ("joint", [True, True, True])):
        gate = HeadGate(24, 3, kind=chosen)
        change = (gate(x) - gate(other)).abs().amax((0, 2, 3))
        assert (change > 1e-4).tolist() == moved


def test_a_pooled_gate_is_one_for_all_positions():
    x = torch.randn(2, 5, 24)
    gate = HeadGate(24, 3, pooled=True)
    expected = torch.sigmoid(HeadGate.logits(gate, x))
    assert gate(x).shape == (2, 3, 1, 1)
    torch.testing.assert_close(gate(x)[..., 0, 0], expected[:, 0])


def test_a_closed_gate_says_nothing_and_an_open_one_is_attention():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(gated_attention(q, k, v, torch.ones(1, 2, 5, 1)), whole)
    shut = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert not gated_attention(q, k, v, shut)[:, 0].any()


def test_steps_are_the_whole():
    torch.manual_seed(0)
    layer, x, state, parts = Gated(dim=24, heads=3, kind="mlp").build(), torch.randn(2, 9, 24), None, []
    for piece in x.split(2, 1):
        out, state = layer.step(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))
    again, _ = layer.step(x[:, 8:], tuple(s[:, :, :8] for s in state))
    torch.testing.assert_close(again, layer(x)[:, 8:])


FAMILY = ("llama", "mistral", "gpt2", "bert", "vit", "falcon")


@pytest.mark.parametrize("family", FAMILY)
def test_a_model_with_fresh_gates_is_what_it_was(family):
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs(model, "left" if FAMILIES[family].pads else "none")
    plain, names = outputs(model, inputs), {n for n, _ in model.named_parameters()}
    gates = add_gates(model, start=0.25)
    assert_same(outputs(model, inputs), plain, inputs, 5e-2)
    with torch.no_grad():
        for gate in gates.values():
            gate.weight.zero_()
    assert_same(outputs(model, inputs), plain, inputs)
    for gate in gates.values():
        torch.nn.init.constant_(gate.bias, -30.0)
    shut = outputs(model, inputs)
    assert differ(shut, plain)
    new = {n for n, _ in model.named_parameters()} - names
    assert (
        len(new) == 2 * len(gates) and all("head_gate" in n for n in new) and new <= set(model.state_dict())
    )
    remove_gates(model)
    assert torch.equal(outputs(model, inputs), plain)
    assert {n for n, _ in model.named_parameters()} == names


def test_gates_are_trained_and_gates_of_one_head_shut_that_head_alone():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    gates = add_gates(model, kind="mlp")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for g in gates.values() for p in g.parameters())
    seen = []
    projection = model.model.layers[0].self_attn.o_proj
    hook = projection.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    outputs(model, inputs)
    with torch.no_grad():
        gates["text.0"].bias[1] = -100
    outputs(model, inputs)
    hook.remove()
    before, after = (x.unflatten(-1, (4, -1)) for x in seen)
    assert torch.equal(before[:, :, [0, 2, 3]], after[:, :, [0, 2, 3]]) and not after[:, :, 1].any()


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_gates_generate_as_without_a_cache(way):
    model = FAMILIES["llama"].build()
    for gate in add_gates(model, kind="joint", fine_tune=False).values():
        torch.nn.init.normal_(gate.weight)
    inputs = prompt("llama", model)
    tokens, scores = generated(model, inputs, **way)
    plain = {**way, "cache_implementation": None, "use_cache": False}
    again, others = generated(model, inputs, **plain)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)


def test_a_copy_has_gates_of_its_own(tmp_path):
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    add_gates(model)
    expected = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = twin.model.layers[0].self_attn.head_gate
        assert isinstance(own, PlacedGate) and own is not model.model.layers[0].self_attn.head_gate
        with torch.no_grad():
            own.bias.fill_(-30.0)
        assert differ(outputs(twin, inputs), expected)
        assert torch.equal(outputs(model, inputs), expected)
        remove_gates(twin)
        outputs(twin, inputs)
    model.load_state_dict(model.state_dict())


def test_chosen_layers_and_refusals():
    model = FAMILIES["llama"].build()
    assert list(add_gates(model, layers=[1])) == ["text.1"]
    with pytest.raises(RegardError, match="text.1 has a gate already"):
        add_gates(model)
    assert not hasattr(model.model.layers[0].self_attn, "head_gate")
    remove_gates(model)
    with pytest.raises(RegardError, match="has no gates"):
        remove_gates(model)
    with pytest.raises(RegardError, match="looks ahead"):
        add_gates(model, pooled=True)
    with pytest.raises(NoSuchSite, match="no layers"):
        add_gates(model, layers=[])
    with pytest.raises(NoSuchSite, match="no layer 7"):
        add_gates(model, layers=[7])
    with pytest.raises(RegardError, match="kind is 'conv'"):
        add_gates(model, kind="conv")
    with pytest.raises(UnsupportedModel, match="Linear"):
        add_gates(torch.nn.Linear(3, 3))


WRONG = [
    ({"dim": 24, "heads": 5}, "5 heads do not divide"),
    ({"dim": 24, "heads": 0}, "heads is 0"),
    ({"dim": 24, "heads": 3, "kind": "cnn"}, "linear, mlp, joint, constant"),
    ({"dim": 24, "heads": 3, "start": 1.0}, "start is 1.0"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(RegardError, match=words):
        Gated(**options)
    with pytest.raises(RegardError, match=words):
        HeadGate(options.pop("dim"), options.pop("heads"), **options)


def test_wrong_calls_are_refused():
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ShapeMismatch, match=r"gate must be \[1, 2, 5, 1\]"):
        gated_attention(q, q, q, torch.ones(1, 2, 4, 1))
    with pytest.raises(ShapeMismatch, match="batch, time, 24"):
        HeadGate(24, 3)(torch.zeros(1, 5, 23))
    with pytest.raises(RegardError, match="divides the gate by start"):
        HeadGate(24, 3, start=None, fine_tune=True)
    with pytest.raises(RegardError, match="1 numbers that are NaN"):
        gated_attention(q, q, q, torch.full((1, 2, 1, 1), 1.0).index_fill(1, torch.tensor([1]), torch.nan))
