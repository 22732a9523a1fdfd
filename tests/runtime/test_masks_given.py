"""Masks, packs and caches that a user brings: what lenses and edits say of them, against dense attention."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import regard
from regard.errors import RegardError
from regard.lens import (
    ColumnMass,
    Entropy,
    Induction,
    MeanDistance,
    Patterns,
    PreviousToken,
    ResidualNorm,
    Sinks,
)
from regard.runtime.edits import ForceAttention, ScaleHeads
from tests.lens.dense import assert_same
from tests.support.families import FAMILIES

LENSES = (Sinks, ColumnMass, Entropy, MeanDistance, PreviousToken, Patterns)
LENGTH = 9


@pytest.fixture(scope="module", params=["llama", "gpt2", "falcon"])
def model(request):
    return FAMILIES[request.param].build()


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


@pytest.fixture
def ids(model):
    return FAMILIES["llama"].inputs(model)["input_ids"]


def causal(length=LENGTH, first=0, keys=LENGTH):
    """Bool [2, 1, length - first, keys]."""
    mask = torch.zeros(2, 1, length, keys, dtype=torch.bool)
    mask[..., :length] = torch.ones(length, length).tril().bool()
    return mask[:, :, first:]


def additive(mask, low):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def watched(model, run, *lenses):
    with torch.no_grad(), regard.watch(model, *(lens() for lens in lenses)) as seen:
        run()
    return [seen[lens] for lens in lenses]


def same(model, run, plain, lenses=LENSES):
    for one, other in zip(watched(model, run, *lenses), watched(model, plain, *lenses), strict=True):
        assert_same(one, other, 1e-4)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("low", [LOWEST, float("-inf"), -1e9])
def test_an_additive_mask_hides_as_a_causal_model_does(model, ids, low):
    same(model, lambda: model(ids, attention_mask=additive(causal(), low)), lambda: model(ids))


def test_a_bool_mask_of_ones_own(model, ids):
    same(model, lambda: model(ids, attention_mask=causal()), lambda: model(ids))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_positions_under_a_mask_and_a_cache_of_ones_own(model, ids, kind):
    if kind == "static" and type(model).__name__.startswith("Falcon"):
        pytest.skip("Falcon has no static cache.")
    room = 16 if kind == "static" else LENGTH

    def run():
        config = model.config
        cache = StaticCache(config, max_cache_len=room) if kind == "static" else DynamicCache(config=config)
        model(ids[:, :5], past_key_values=cache, attention_mask=causal(5, 0, room if kind == "static" else 5))
        model(ids[:, 5:], past_key_values=cache, attention_mask=causal(LENGTH, 5, room))

    lenses = tuple(lens for lens in LENSES if not (kind == "static" and lens is Patterns))
    same(model, run, lambda: model(ids), lenses)


def test_a_window_of_ones_own_under_a_sliding_cache():
    model = FAMILIES["mistral"].build()
    ids = FAMILIES["mistral"].inputs(model)["input_ids"]
    window = causal() & torch.ones(LENGTH, LENGTH).triu(-3).bool()

    def run():
        cache = DynamicCache(config=model.config)
        model(ids[:, :6], past_key_values=cache)
        keys = cache.layers[0].keys.shape[2] + 3
        model(ids[:, 6:], past_key_values=cache, attention_mask=window[:, :, 6:, LENGTH - keys :])

    same(model, run, lambda: model(ids))


@pytest.mark.parametrize("low", [LOWEST, float("-inf"), -1e9, -1e4])
def test_edits_leave_hidden_keys_hidden(model, ids, low):
    edits = (
        ScaleHeads(heads=[(0, 1)], mode="uniform"),
        ForceAttention(
            [(1, 2)], to=lambda block: block.key_positions[:, None, :] >= block.query_positions[:, :, None]
        ),
    )
    outputs = []
    for mask in (causal(), additive(causal(), low)):
        with torch.no_grad(), regard.steer(model, *edits):
            outputs.append(model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def packed():
    one, two = torch.arange(5, 11), torch.tensor([8, 9, 10, 8, 9, 10, 8])
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    return one, two, {"input_ids": torch.cat([one, two])[None], "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("lens", [Entropy, MeanDistance, PreviousToken, Induction])
def test_packed_texts_count_row_by_row(llama, lens):
    """A row of a pack sees its own text only; that of which a lens needs more is said in docs/gotchas.md."""
    one, two, pack = packed()
    [found] = watched(llama, lambda: llama(**pack), lens)
    [apart] = watched(llama, lambda: (llama(one[None]), llama(two[None])), lens)
    assert_same(found, apart, 1e-4)


def test_a_pack_is_no_text_of_full_reach_to_sinks(llama):
    _, _, pack = packed()
    [sinks] = watched(llama, lambda: llama(**pack), Sinks)
    np.testing.assert_allclose(sinks["reach"], 6 / 13)
    assert sinks.windowed == ["text.0", "text.1"]


@pytest.fixture
def prefix(llama):
    """The cache of five tokens that ran before any session, and those that follow."""
    cache = DynamicCache(config=llama.config)
    ids = FAMILIES["llama"].inputs(llama)["input_ids"]
    with torch.no_grad():
        llama(ids[:, :5], past_key_values=cache)
    return ids, lambda: llama(ids[:, 5:], past_key_values=copy.deepcopy(cache))


def test_weights_behind_an_unseen_cache_are_refused(llama, prefix):
    _, go_on = prefix
    with torch.no_grad(), regard.watch(llama) as seen:
        go_on()
    with pytest.raises(RegardError, match="after 5 positions in a cache"):
        seen.weights(1, 2)


def test_patterns_behind_an_unseen_cache_tell_what_was_not_seen(llama, prefix):
    ids, go_on = prefix
    with torch.no_grad(), regard.watch(llama, Patterns()) as seen:
        go_on()
    with torch.no_grad(), regard.watch(llama, Patterns()) as whole:
        llama(ids)
    found, expected = seen.weights(1, 2), whole.weights(1, 2)
    assert found[:5].isnan().all()
    torch.testing.assert_close(found[5:], expected[5:], rtol=1e-4, atol=1e-5)


def test_pooled_patterns_behind_an_unseen_cache_are_means_over_rows_seen(llama):
    ids = torch.arange(5, 28)[None]
    cache = DynamicCache(config=llama.config)
    lens = Patterns(heads=[(1, 2)], max_tokens=8)
    with torch.no_grad():
        llama(ids[:, :9], past_key_values=cache)
        with regard.watch(llama, lens) as seen:
            llama(ids[:, 9:], past_key_values=cache)
        with regard.watch(llama, Patterns(heads=[(1, 2)])) as whole:
            llama(ids)
    pattern = seen[Patterns].pattern("text.1")
    dense = whole.weights(1, 2)
    assert pattern.width == 4
    found = pattern.weights[0]
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2], _bins(dense[9:12]), rtol=1e-4, atol=1e-5)


def _bins(rows):
    padded = torch.nn.functional.pad(rows.mean(0), (0, 1))
    return padded.view(6, 4).sum(1)


def test_residual_norms_behind_an_unseen_cache_know_no_first_token(llama, prefix):
    ids, go_on = prefix
    [found] = watched(llama, go_on, ResidualNorm)
    assert np.isnan(found.table["first"]).all() and np.isnan(found.table["peak"]).all()
    with torch.no_grad():
        hidden = llama(ids, output_hidden_states=True).hidden_states[1]
    np.testing.assert_allclose(found.table["others"][0], hidden[:, 5:].norm(dim=-1).mean(), rtol=1e-5)
    assert 5 <= found.table["largest_other_at"][0] < LENGTH
