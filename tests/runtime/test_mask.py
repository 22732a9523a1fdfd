"""The lazy mask against transformers' own dense one."""

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import eager_mask

from regard.runtime.mask import lazy_mask
from tests.support.families import FAMILIES

CAUSAL, BOTH = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
WINDOW = masking_utils.sliding_window_causal_mask_function(3)
CHUNKS = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: q // 4 == k // 4)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
SIZES = [(7, 7, 0, 0), (1, 7, 6, 0), (3, 7, 4, 0), (1, 3, 6, 4), (2, 4, 5, 3)]


def dense(sizes, function, padding):
    queries, keys, q_offset, kv_offset = sizes
    mask = eager_mask(
        batch_size=2, q_length=queries, kv_length=keys, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=padding, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    return mask == 0


def lazy(sizes, function, padding, **options):
    return lazy_mask(2, *sizes, mask_function=function, attention_mask=padding, **options)


@pytest.mark.parametrize("padding", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("function", [CAUSAL, WINDOW, CHUNKS], ids=["causal", "window", "chunks"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_dense_mask(sizes, function, padding):
    local = {CAUSAL: None, WINDOW: 3, CHUNKS: 4}[function]
    mask = lazy(sizes, function, padding, local_size=local, allow_is_causal_skip=function is not CHUNKS)
    expected = dense(sizes, function, padding)
    assert torch.equal(mask.to_dense().expand_as(expected), expected)
    queries, keys = sizes[:2]
    for start in range(0, queries, 2):
        stop = min(start + 2, queries)
        first, last = mask.view.bounds(start, stop)
        seen = expected[:, :, start:stop]
        assert not seen[..., :first].any() and not seen[..., last:].any()
        rows = mask.view.rows(start, stop, first, last)
        part = torch.ones(()).bool() if rows is None else rows
        assert torch.equal(part.expand_as(seen[..., first:last]), seen[..., first:last])
    assert torch.equal(
        mask[:, :, -1:, :keys].eq(0).expand_as(expected[:, :, -1:]), expected[:, :, -1:, :keys]
    )


def test_nothing_is_evaluated_that_nobody_asks_for():
    def refuse(*_):
        raise AssertionError("evaluated")

    mask = lazy((7, 7, 0, 0), refuse, None, allow_is_causal_skip=False)
    assert "7" in repr(mask) and mask.shape == (2, 1, 7, 7) and mask.ndim == mask.dim() == 4
    assert mask.to("cpu") is mask and mask.contiguous() is mask and mask.dtype == torch.float32
    with pytest.raises(AssertionError, match="evaluated"):
        mask.view.rows(0, 1, 0, 7)


def test_says_which_rows_keys_and_offsets_are_real():
    mask = lazy((3, 7, 4, 0), CAUSAL, PADDED)
    assert mask.pad_left.tolist() == [2, 0]
    assert torch.equal(mask.valid_keys, PADDED) and torch.equal(mask.valid_queries, PADDED[:, 4:])
    assert (mask.q_offset, mask.kv_offset) == (4, 0)
    sliding = lazy((1, 3, 6, 4), WINDOW, PADDED, local_size=3)
    assert torch.equal(sliding.valid_keys, PADDED[:, 4:])
    whole = lazy((3, 7, 4, 0), CAUSAL, torch.ones(2, 7).bool())
    assert whole.valid_keys is None and whole.pad_left is None


def test_an_offset_that_changes_later_was_taken_before():
    offset = torch.tensor(4)
    mask = lazy((3, 7, offset, 0), CAUSAL, PADDED)
    offset += 3
    assert mask.q_offset == 4 and torch.equal(mask.to_dense(), dense((3, 7, 4, 0), CAUSAL, PADDED))


ABOUT = [
    (CAUSAL, {}, True),
    (BOTH, {"allow_is_bidirectional_skip": True}, True),
    (CHUNKS, {"allow_is_causal_skip": False}, False),
    (WINDOW, {"local_size": 3}, False),
    (WINDOW, {"local_size": 30}, True),
]


@pytest.mark.parametrize(("function", "options", "plain"), ABOUT)
def test_knows_whether_it_is_more_than_order_and_padding(function, options, plain):
    assert lazy((7, 7, 0, 0), function, PADDED, **options).plain is plain


def test_transformers_takes_it_for_a_mask_that_is_ready():
    model, ids = FAMILIES["llama"].build("regard"), torch.arange(5, 19).view(2, 7)
    with torch.no_grad():
        expected = model(ids, attention_mask=PADDED.long()).logits[PADDED]
        found = model(ids, attention_mask=lazy((7, 7, 0, 0), CAUSAL, PADDED)).logits[PADDED]
        unpadded = model(ids).logits[PADDED]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, unpadded, atol=1e-2)
