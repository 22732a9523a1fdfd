"""An edit that met nothing of what it is meant for says so when its session ends."""

import pytest
import torch

import regard
from regard.errors import NothingObserved
from regard.lens import Entropy
from regard.runtime import Edit, Point
from regard.runtime.edits import EditWeights, ForceAttention, ScaleHeads, ScoreBias
from tests.support.families import FAMILIES

TEXT = {"input_ids": torch.arange(5, 12)[None]}


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].build()


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build()


def steered(model, *edits):
    with torch.no_grad(), regard.steer(model, *edits) as seen:
        model(**TEXT)
    return seen


@pytest.mark.parametrize(
    "edit",
    [
        ScaleHeads({("vision.0", 1): 0.0}),
        ScaleHeads({("vision.0", 1): 0.0, (1, 1): 0.0}),
        EditWeights(lambda weights, block: weights, layers=["vision.1"]),
        ForceAttention([("vision.1", 0)], to="self"),
        ScoreBias(1.0, layers=["vision.0"], positions=[0]),
        ScoreBias({"vision.0": 1.0}, positions=[0]),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_a_layer_that_was_named_and_not_called(llava, edit):
    with pytest.raises(
        NothingObserved, match=rf"{type(edit).__name__} names vision\.[01], which was not called"
    ):
        steered(llava, edit)


@pytest.mark.parametrize("point", [Point("head", "vision.0", head=1), Point("residual", "vision.0")])
def test_a_point_that_was_not_reached(llava, point):
    with pytest.raises(NothingObserved, match=r"Patch names vision\.0"), regard.patch(llava, {point: 0.0}):
        llava(**TEXT)


class Nowhere(Edit):
    def wants(self, call):
        return None

    def weights(self, block):
        return block.weights


class Silent(Edit):
    """Changes what goes into the forward and no call."""

    def wants(self, call):
        return None

    def prepare(self, run, kwargs):
        kwargs["use_cache"] = False


def test_an_edit_that_wanted_no_call(llama):
    with pytest.raises(NothingObserved, match="Nowhere changed nothing"):
        steered(llama, Nowhere())
    steered(llama, Silent())


def test_an_edit_of_an_earlier_session_is_looked_at_anew(llava):
    edit = ScaleHeads({("vision.0", 1): 0.0})
    with torch.no_grad(), regard.watch(llava, Entropy()):
        with regard.steer(llava, edit):
            llava(**FAMILIES["llava"].inputs(llava))
        with pytest.raises(NothingObserved, match=r"names vision\.0"):
            steered(llava, edit)


@pytest.mark.parametrize(
    "edit", [ScaleHeads({(0, 1): 1.0}), ForceAttention([(0, 1)], to="first", strength=0.0)]
)
def test_an_edit_that_is_idle_by_its_options_is_no_mistake(llama, edit):
    with torch.no_grad():
        plain = llama(**TEXT).logits
        with regard.steer(llama, edit):
            torch.testing.assert_close(llama(**TEXT).logits, plain, rtol=1e-5, atol=1e-5)


def test_an_exception_in_the_block_is_not_hidden(llava):
    with pytest.raises(KeyError), regard.steer(llava, ScaleHeads({("vision.0", 1): 0.0})):
        llava(**TEXT)
        raise KeyError
