"""The contract can fail: without any one argument of the attention interface the output is another."""

import pytest
import torch

import regard
from regard.engines.masks import CausalMask, Mask
from regard.runtime import function
from tests.runtime.test_contract import RELATIVE
from tests.support.families import FAMILIES, valid
from tests.support.stages import Rows


def without(**values):
    """Put other values into a call."""

    def lose(call):
        for name, value in values.items():
            setattr(call, name, value)

    return lose


def unscaled(call):
    call.scale = call.q.shape[-1] ** -0.5


def only_causal(call):
    call.mask = CausalMask(call.query_length, call.key_length)


def unmasked(call):
    call.mask = Mask(call.query_length, call.key_length)


def cross_unmasked(call):
    if call.site.cross:
        unmasked(call)


CASES = {
    "softcap": ("gemma2", "none", without(softcap=None)),
    "sink-logits": ("gpt-oss", "none", without(sink_logits=None)),
    "padding": ("llama", "left", only_causal),
    "padding-right": ("bert", "right", unmasked),
    "padding-of-keys": ("bart", "left", cross_unmasked),
    "causal-order": ("llama", "none", unmasked),
    "causal-order-of-a-decoder": ("bart", "none", unmasked),
    "window": ("mistral", "none", only_causal),
    "bias": ("t5", "none", without(bias=None)),
    "scale-one": ("t5", "none", unscaled),
    "scale-in-the-queries": ("whisper", "none", unscaled),
    "scale-of-its-own": ("gemma2", "none", unscaled),
}


def output(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def off(found, expected, inputs):
    """How far apart two outputs are at most, over the largest number in the second."""
    keep = valid(inputs, expected.shape)
    return float((found - expected)[keep].abs().max() / expected[keep].abs().max())


@pytest.mark.parametrize("lenses", [[], [Rows()]], ids=["idle", "rows"])
@pytest.mark.parametrize("case", CASES)
def test_losing_an_argument_shows(case, lenses, monkeypatch):
    name, padding, lose = CASES[case]
    family = FAMILIES[name]
    model = family.build("eager")
    inputs = family.inputs(model, padding)
    expected = output(model, inputs)
    build = function.call_from_interface

    def losing(*arguments):
        call = build(*arguments)
        lose(call)
        return call

    with regard.watch(model, *lenses):
        kept = output(model, inputs)
        monkeypatch.setattr(function, "call_from_interface", losing)
        lost = output(model, inputs)
    assert off(kept, expected, inputs) <= RELATIVE
    assert off(lost, expected, inputs) > 100 * RELATIVE


OPTIONS = {"scaling": ("t5", "none"), "softcap": ("gemma2", "none"), "s_aux": ("gpt-oss", "none")}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_the_interface_is_read_by_its_name(option, monkeypatch):
    name, padding = OPTIONS[option]
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model, padding)
    build = function.call_from_interface
    seen = []

    def losing(run, site, q, k, v, mask, options):
        seen.append(options.get(option))
        return build(run, site, q, k, v, mask, {**options, option: None})

    with regard.watch(model):
        expected = output(model, inputs)
        monkeypatch.setattr(function, "call_from_interface", losing)
        lost = output(model, inputs)
    assert all(value is not None for value in seen)
    assert off(lost, expected, inputs) > 100 * RELATIVE


def test_dropout_is_applied_while_training():
    model = FAMILIES["llama"].build("eager").train()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    inputs = FAMILIES["llama"].inputs(model)
    outputs = {}
    for way, lenses in {"plain": None, "idle": [], "rows": [Rows()]}.items():
        torch.manual_seed(1)
        if lenses is None:
            outputs[way] = output(model, inputs)
        else:
            with regard.watch(model, *lenses):
                outputs[way] = output(model, inputs)
    expected = output(model.eval(), inputs)
    assert all(off(found, expected, inputs) > 100 * RELATIVE for found in outputs.values())
    with regard.watch(model):
        assert off(output(model, inputs), expected, inputs) <= RELATIVE
