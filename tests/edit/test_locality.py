"""check_row_local: what passes, what is caught, and that the edits of general use pass."""

import pytest
import torch

import regard
from regard.edit import EditWeights, ForceAttention, ScaleHeads, ScoreBias, check_row_local, redistribute
from regard.errors import NothingObserved, RegardError
from regard.runtime import Edit
from tests.support.families import FAMILIES

PADDINGS = ("none", "left", "right")


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def sharpened(weights, block):
    power = weights.square()
    return power / power.sum(-1, keepdim=True).clamp_min(1e-9)


def from_first(weights, block):
    first = (block.key_positions == 0)[:, None, None, :]
    return redistribute(weights, first, ~first, 0.5)


LOCAL = {
    "sharpened": EditWeights(sharpened),
    "redistributed": EditWeights(from_first, layers=[1], heads=[2, 0]),
    "forced": ForceAttention([(0, 1), (1, 3)], to="previous", strength=0.5),
    "uniform": ScaleHeads({(0, 1): 0.5, (1, 0): 0.0}, mode="uniform"),
    "mean": ScaleHeads(heads=[(0, 1)], mode="mean"),
    "bias": ScoreBias(torch.linspace(-1, 1, 8).view(2, 4), heads=[3, 1]),
}


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("padding", PADDINGS)
def test_row_local_edits_pass(llama, name, padding):
    check_row_local(llama, LOCAL[name], FAMILIES["llama"].inputs(llama, padding))


@pytest.mark.parametrize("family", ["mistral", "gpt-oss", "gemma2", "falcon"])
@pytest.mark.parametrize("name", LOCAL)
def test_they_pass_in_windows_and_beside_sinks(family, name):
    model = FAMILIES[family].build()
    check_row_local(model, LOCAL[name], FAMILIES[family].inputs(model, "left"), rows=2)


def over_rows(weights, block):
    return 0.5 * (weights + weights.mean(2, keepdim=True))


def over_batch_rows(weights, block):
    return weights * weights.amax((0, 2), keepdim=True)


def first_of_block(weights, block):
    return torch.cat([weights[:, :, :1] * 0.5, weights[:, :, 1:]], 2)


@pytest.mark.parametrize("function", [over_rows, over_batch_rows, first_of_block])
@pytest.mark.parametrize("padding", PADDINGS)
def test_edits_that_mix_rows_are_caught(llama, function, padding):
    edit = EditWeights(function, layers=[1], heads=[2])
    with pytest.raises(RegardError, match="EditWeights is not row-local: at text.1") as caught:
        check_row_local(llama, edit, FAMILIES["llama"].inputs(llama, padding))
    assert "survey(block)" in str(caught.value)


def test_the_first_layer_that_differs_is_named(llama):
    with pytest.raises(RegardError, match="at text.0 its outputs in blocks of 2 rows"):
        check_row_local(llama, EditWeights(over_rows), FAMILIES["llama"].inputs(llama), rows=2)


def test_a_difference_on_padded_rows_alone_does_not_count(llama):
    def padded_mixed(weights, block):
        return torch.where(block.valid_rows[:, None, :, None], weights, weights.mean(2, keepdim=True))

    check_row_local(llama, EditWeights(padded_mixed), FAMILIES["llama"].inputs(llama, "left"))


class Surveyed(Edit):
    """Divides by what each key gets of all rows that are no padding, seen beforehand."""

    def survey(self, block):
        store = block.call.extra.setdefault("mass", torch.zeros(block.call.key_length))
        store[block.key_start : block.key_stop] += block.column_sum.sum((0, 1))

    def weights(self, block):
        return block.weights / (1 + block.call.extra["mass"][block.key_start : block.key_stop])


def test_an_edit_that_surveys_all_rows_passes(llama):
    check_row_local(llama, Surveyed(), FAMILIES["llama"].inputs(llama, "left"))


def test_an_edit_whose_outputs_are_no_numbers_is_reported_as_that(llama):
    edit = EditWeights(lambda w, block: w / (w - w), layers=[1])
    with pytest.raises(RegardError, match="not finite at text.1"):
        check_row_local(llama, edit, FAMILIES["llama"].inputs(llama))


def test_randomness_is_the_same_on_both_sides_and_left_as_it_was(llama):
    state = torch.get_rng_state()
    check_row_local(llama, LOCAL["sharpened"], FAMILIES["llama"].inputs(llama))
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_too_short_to_tell_are_refused(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with pytest.raises(NothingObserved, match="more than 9 positions"):
        check_row_local(llama, LOCAL["sharpened"], inputs, rows=9)


def test_the_model_is_left_as_it_was(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with torch.no_grad():
        before = llama(**inputs).logits
        with pytest.raises(RegardError):
            check_row_local(llama, EditWeights(over_rows), inputs)
        assert torch.equal(llama(**inputs).logits, before)
    with torch.no_grad(), regard.watch(llama) as seen:
        llama(**inputs)
    assert seen.silent == []
