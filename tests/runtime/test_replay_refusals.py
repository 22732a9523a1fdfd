"""What a replay refuses, and that it leaves the model as it was."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

import regard
from regard import Point
from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime import Replay, collect
from regard.runtime.edits.scale import ScaleHeads
from regard.runtime.patch import Patch
from regard.runtime.row_patch import RowPatch
from tests.support.replayed import close, forward, made, score, three_layers


@pytest.fixture(scope="module")
def model_and_inputs():
    return three_layers()


@pytest.fixture
def llama(model_and_inputs):
    return model_and_inputs[0]


@pytest.fixture
def inputs(model_and_inputs):
    return model_and_inputs[1]


@pytest.mark.parametrize(
    ("edit", "layer"),
    [
        (Patch({Point("head", 0, head=1): 0.0}), 1),
        (Patch({Point("head", "text.1", head=1): 0.0, Point("head", 2, head=1): 0.0}), 2),
        (Patch({Point("residual", 1): 0.0}), 2),
        (Patch({Point("embedding"): 0.0}), 1),
        (RowPatch([(Point("mlp", 0), 0.0)]), 1),
        (ScaleHeads({(0, 2): 0.0}), 1),
    ],
)
def test_edits_before_the_start_are_refused(llama, inputs, edit, layer):
    with pytest.raises(RegardError, match="before layer"):
        Replay(llama, inputs).run(layer, edit)


def test_layers_and_batches_that_are_not_there(llama, inputs):
    replay = Replay(llama, inputs)
    with pytest.raises(NoSuchSite, match=r"text.0 to text.2"):
        replay.run(3)
    with pytest.raises(NoSuchSite, match="no head 9"):
        replay.sweep([Point("head", 0, head=9)], 0.0, score)
    for batch in (0, 1.5):
        with pytest.raises(RegardError, match="at least 1"):
            replay.run(1, batch=batch)
        with pytest.raises(RegardError, match="at least 1"):
            replay.sweep([Point("mlp", 0)], 0.0, score, batch=batch)
    with pytest.raises(RegardError, match="no points"):
        replay.sweep([], 0.0, score)
    with pytest.raises(ShapeMismatch, match="one number"):
        replay.sweep([Point("mlp", 0)], 0.0, lambda logits: logits)
    with pytest.raises(RegardError, match="str"):
        replay.sweep([Point("mlp", 0)], 0.0, lambda logits: "high")
    with pytest.raises(ShapeMismatch, match="do not divide"):
        replay.run(1, RowPatch([(Point("mlp", 1), 0.0)] * 3))


def test_models_that_are_refused(llama, inputs):
    for name in ("t5", "bart"):
        model, given = made(name)
        with pytest.raises(UnsupportedModel, match="encoder-decoder"):
            Replay(model, given)
    with pytest.raises(RegardError, match="training mode"):
        llama.train()
        try:
            Replay(llama, inputs)
        finally:
            llama.eval()
    with pytest.raises(RegardError, match="cache"):
        Replay(llama, {**inputs, "past_key_values": tf.DynamicCache()})
    with pytest.raises(RegardError, match="input_ids"):
        Replay(llama, {"attention_mask": inputs["attention_mask"]})


def test_blocks_that_are_shared_are_refused():
    model, given = made("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnsupportedModel):
        Replay(model, given)
    assert "forward" not in model.model.layers[0].__dict__


def test_blocks_that_return_something_else_are_refused(llama, inputs, monkeypatch):
    block, plain = type(llama.model.layers[0]), type(llama.model.layers[0]).forward
    monkeypatch.setattr(block, "forward", lambda *a, **k: SimpleNamespace(hidden=plain(*a, **k)))
    with pytest.raises(UnsupportedModel, match="SimpleNamespace"):
        Replay(llama, inputs)


@pytest.mark.parametrize("lost", [True, False])
def test_blocks_that_hand_on_more_than_their_output_are_refused(lost):
    """The second block adds what the first one left behind: gone, or changed, when only the second runs."""
    model, given = made("llama")
    first, second = model.model.layers
    left = []

    def leave(module, args, output):
        left.append(output.mean())

    def use(module, args, output):
        return output + (left.pop() if lost else len(left) * 5)

    first.mlp.register_forward_hook(leave)
    second.mlp.register_forward_hook(use)
    if not lost:
        second.register_forward_hook(lambda *_: left.clear())
    with pytest.raises(UnsupportedModel, match="more than their output"):
        Replay(model, given)


def test_the_model_is_as_it_was_after_an_error(llama, inputs):
    expected = forward(llama, inputs)
    replay = Replay(llama, inputs)
    with pytest.raises(ZeroDivisionError):
        replay.run(1, Patch({Point("mlp", 1): lambda x: x / (1 // 0)}))
    with pytest.raises(ShapeMismatch):
        replay.run(1, Patch({Point("mlp", 1): torch.zeros(5, 7)}))
    assert torch.equal(forward(llama, inputs), expected)
    assert close(replay.run(1), replay.logits)
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in llama.modules())


def test_a_row_patch_names_at_least_one_point(llama):
    with pytest.raises(RegardError, match="at least one"):
        regard.steer(llama, RowPatch([]))
    with pytest.raises(NoSuchSite):
        collect(llama, {}, [Point("router", 0)])


def test_modules_in_training_are_found_anywhere(llama, inputs):
    llama.model.layers[1].add_module("extra", nn.Dropout(0.5))
    try:
        with pytest.raises(RegardError, match="training mode"):
            Replay(llama, inputs)
    finally:
        del llama.model.layers[1].extra
