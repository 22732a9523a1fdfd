"""Chosen rows of chosen heads attend as they are told, against attention written out."""

import re

import pytest
import torch

import regard
from regard.edit import ForceAttention, force_attention
from regard.errors import NoSuchSite, RegardError
from tests.edit.plain import changed, close, logits
from tests.edit.test_edit_weights import Weights
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def forced_by_hand(llama, inputs, layer, head, rows, shares):
    """`rows` [B, n], `shares` a list of {position: weight}, in a batch that may be padded on the left."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    shift = mask.shape[1] - mask.sum(1)

    def by_hand(number, weights, module):
        if number == layer:
            for b, (each, share) in enumerate(zip(rows, shares, strict=True)):
                for row in each:
                    at = row + int(shift[b])
                    weights[b, head, at] = 0.0
                    for key, weight in share.items():
                        weights[b, head, at, key + int(shift[b])] = weight
        return weights

    with changed(llama, weights=by_hand):
        return logits(llama, inputs)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_row_gets_the_distribution_and_no_other_head_does(llama, padding):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    pattern = {(1, 2): {4: {0: 0.25, 3: 0.75}}}
    expected = forced_by_hand(llama, inputs, 1, 2, [[4], [4]], [{0: 0.25, 3: 0.75}] * 2)
    with force_attention(llama, pattern):
        found = logits(llama, inputs)
    assert close(found, expected) and not close(found, logits(llama, inputs))
    with force_attention(llama, pattern, strength=0.0):
        assert close(logits(llama, inputs), forced_by_hand(llama, inputs, 1, 2, [[], []], [{}, {}]))


def test_each_sequence_has_rows_and_positions_of_its_own(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    rows, to = torch.tensor([[3], [5]]), torch.tensor([[1, 2], [0, 4]])
    shares = [{1: 0.5, 2: 0.5}, {0: 0.5, 4: 0.5}]
    expected = forced_by_hand(llama, inputs, 0, 1, rows.tolist(), shares)
    with force_attention(llama, {(0, 1): (rows, to)}):
        assert close(logits(llama, inputs), expected)
    with regard.steer(llama, ForceAttention([(0, 1)], to=to, rows=rows), Weights()) as seen:
        logits(llama, inputs)
    kept = seen[Weights]["text.0"][0]
    with regard.watch(llama, Weights()) as seen:
        logits(llama, inputs)
    plain = seen[Weights]["text.0"][0]
    differs = (kept != plain).any(-1).nonzero().tolist()
    assert differs == [[0, 1, 3], [1, 1, 5]]


def test_what_a_row_may_not_see_goes_to_what_it_may(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with regard.steer(
        llama, ForceAttention([(0, 1)], to={1: 0.4, 5: 0.6}, rows=[0, 3, 6]), Weights()
    ) as seen:
        logits(llama, inputs)
    kept = seen[Weights]["text.0"][0][0, 1]
    assert kept[3, 1] == 1.0 and kept[0, 0] == 1.0
    torch.testing.assert_close(kept[6, [1, 5]], torch.tensor([0.4, 0.6]))


def test_a_function_may_return_weights(llama):
    inputs = FAMILIES["llama"].inputs(llama)

    def falling(block):
        return (-block.key_positions.float())[:, None].exp().expand(-1, block.stop - block.start, -1)

    with regard.steer(llama, ForceAttention([(0, 1)], to=falling), Weights()) as seen:
        logits(llama, inputs)
    row = torch.exp(-torch.arange(4.0))
    torch.testing.assert_close(seen[Weights]["text.0"][0][1, 1, 3, :4], row / row.sum())


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_forcing_holds_while_generating(llama, options):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    patterns = {(0, 0): (last, torch.tensor([[1], [0]])), (1, 3): {8: {0: 0.5, 2: 0.5}}}
    settings = {"max_new_tokens": 4, "do_sample": False, **options}
    with force_attention(llama, patterns):
        found = llama.generate(**inputs, **settings)
        whole = {k: v for k, v in settings.items() if k != "cache_implementation"}
        without = llama.generate(**inputs, use_cache=False, **whole)
    assert torch.equal(found, without)


@pytest.mark.parametrize(
    ("patterns", "error", "said"),
    [
        ({}, RegardError, "patterns is empty"),
        ({(0, 1): {}}, RegardError, "patterns is empty"),
        ({(0, 1): {-1: {0: 1.0}}}, RegardError, "rows has position -1"),
        ({(0, 1): {3: {0: 0.5}}}, RegardError, "weights of sum 1"),
        ({(0, 1): {3: {0: 1.5, 1: -0.5}}}, RegardError, "none below 0"),
        ({(0, 1): (torch.tensor([1.0]), torch.tensor([1]))}, RegardError, "positions are int64"),
        ({(9, 1): {3: {0: 1.0}}}, NoSuchSite, "no layer 9"),
        ({(0, 9): {3: {0: 1.0}}}, NoSuchSite, "no head 9"),
    ],
)
def test_bad_input(llama, patterns, error, said):
    with pytest.raises(error, match=re.escape(said)):
        force_attention(llama, patterns)


def test_positions_for_another_batch(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    places = torch.tensor([[1], [1], [2]])
    with (
        pytest.raises(RegardError, match="for 3 sequences, and the batch is 2"),
        force_attention(llama, {(0, 1): (places, places)}),
    ):
        logits(llama, inputs)
