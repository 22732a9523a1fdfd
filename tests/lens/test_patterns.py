"""Kept patterns."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import regard
from regard.errors import NoSuchSite, NothingObserved, RegardError
from regard.lens import Patterns
from regard.lens.grid import Grid
from tests.support.families import FAMILIES


def test_short_patterns_are_exact(watched):
    see, dense, ids = watched
    result = see(Patterns(heads=[(0, 1), (1, 3), (1, 0)]))
    for alias, head in (("text.0", 1), ("text.1", 0), ("text.1", 3)):
        for i, a in enumerate(dense[alias]):
            np.testing.assert_allclose(result.weights(alias, head, i), a[head], rtol=1e-5, atol=1e-6)
            assert torch.equal(result.tokens(alias, i), ids[i])
    with pytest.raises(NoSuchSite, match="head 2 of text.1 was not kept"):
        result.weights("text.1", 2)
    with pytest.raises(NothingObserved, match="sequence 7 of text.1: 2 were kept"):
        result.weights("text.1", 0, 7)


def test_long_patterns_are_pooled(watched):
    see, dense, _ = watched
    result = see(Patterns(heads=[(0, 1)], max_tokens=3))
    for i, a in enumerate(dense["text.0"]):
        found = result.pattern("text.0", i)
        assert found.width == 4
        for r in range(found.weights.shape[1]):
            for c in range(found.weights.shape[2]):
                cell = a[1, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
                np.testing.assert_allclose(found.weights[0, r, c], cell.sum(1).mean(), rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(found.peaks[0, r, c], cell.max(), rtol=1e-5, atol=1e-6)


def test_a_grid_filled_by_blocks_equals_one_filled_at_once():
    a = torch.rand(2, 23, 23)
    whole, parts = Grid(1, 2, 5, a.device), Grid(1, 2, 5, a.device)
    whole.add(0, a, 0, 0)
    for start in range(0, 23, 3):
        for key in range(0, 23, 7):
            parts.add(0, a[:, start : start + 3, key : key + 7], start, key)
    assert whole.width == parts.width == 8
    for one, other in zip(whole.pattern(0), parts.pattern(0), strict=True):
        torch.testing.assert_close(one, other)


def test_all_heads_are_kept_only_of_short_texts(llama):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), regard.watch(llama, Patterns(max_tokens=20)) as seen:
        llama(input_ids=ids)
    assert seen[Patterns].pattern("text.0").heads == (0, 1, 2, 3)
    with torch.no_grad(), regard.watch(llama, Patterns(max_tokens=19)) as seen:
        llama(input_ids=ids)
    with pytest.raises(NothingObserved, match="1 sequences were longer than the 19 tokens"):
        seen[Patterns]


def test_only_so_many_sequences_are_kept(llama):
    ids = torch.randint(5, 90, (3, 6))
    with torch.no_grad(), regard.watch(llama, Patterns(sequences=4)) as seen:
        llama(input_ids=ids)
        llama(input_ids=ids + 1)
    assert [len(p) for p in seen[Patterns].kept.values()] == [4, 4]
    assert torch.equal(seen[Patterns].tokens("text.0", 3), ids[0] + 1)


def test_a_session_answers_from_what_was_kept(llama):
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), regard.watch(llama, Patterns(heads=[(1, 2)])) as seen:
        llama(input_ids=ids)
    kept = seen[Patterns].weights("text.1", 2)
    torch.testing.assert_close(seen.weights(layer=1, head=2), kept)
    assert seen.weights(layer=0, head=0).shape == (10, 10)


def test_a_pattern_that_outgrows_its_grid_while_decoding(llama):
    lens = Patterns(heads=[(0, 0)], max_tokens=8)
    with torch.no_grad(), regard.watch(llama, lens) as seen:
        llama.generate(torch.arange(5, 11)[None], max_new_tokens=12, do_sample=False)
    found = seen[Patterns].pattern("text.0")
    assert found.width == 4 and found.weights.shape == (1, 5, 5)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(1, 5))


@pytest.mark.parametrize("most", [32, 8], ids=["exact", "pooled"])
def test_rows_of_a_cropped_cache_are_forgotten(llama, most):
    ids = torch.arange(5, 25)[None]
    lens = Patterns(heads=[(1, 2)], max_tokens=most)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), regard.watch(llama, lens) as seen:
        llama(ids[:, :10], past_key_values=cache)
        llama(ids[:, :7].flip(1), past_key_values=cache)
        cache.crop(-7)
        llama(ids[:, 10:], past_key_values=cache)
    with torch.no_grad(), regard.watch(llama, lens) as whole:
        llama(ids)
    found, expected = (s[Patterns].pattern("text.1").weights[0] for s in (seen, whole))
    unknown = found.isnan()
    assert unknown.any() == (most == 8) and unknown.all(1).sum() <= 1
    torch.testing.assert_close(found[~unknown], expected[~unknown], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[Patterns].tokens("text.1"), ids[0])


@pytest.mark.real
def test_drafts_that_are_rejected_leave_no_rows(smollm):
    model, tokenizer = smollm
    prompt = tokenizer("The keeper wrote one line a day. The keeper wrote one", return_tensors="pt")
    found = []
    for options in ({"prompt_lookup_num_tokens": 3}, {}):
        with torch.no_grad(), regard.watch(model, Patterns(heads=[(3, 1)])) as seen:
            model.generate(**prompt, max_new_tokens=8, do_sample=False, **options)
        found.append(seen[Patterns].weights("text.3", 1))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_kept_patterns_plot_and_save(llama, tmp_path):
    with torch.no_grad(), regard.watch(llama, Patterns()) as seen:
        llama(input_ids=torch.arange(5, 15)[None])
    seen[Patterns].plot(path=tmp_path / "pattern.png")
    seen[Patterns].save(tmp_path / "patterns.safetensors")
    from safetensors.torch import load_file

    read = load_file(tmp_path / "patterns.safetensors")
    assert torch.equal(read["text.1|0|weights"], seen[Patterns].pattern("text.1").weights)


def test_bad_requests(llama):
    with pytest.raises(RegardError, match="max_tokens is 1"):
        Patterns(max_tokens=1)
    with pytest.raises(NoSuchSite, match="text.1 has no head 4"):
        regard.watch(llama, Patterns(heads=[(1, 4)]))


def test_encoder_decoders_keep_cross_attention():
    model = FAMILIES["bart"].build("eager")
    inputs = FAMILIES["bart"].inputs(model)
    with torch.no_grad(), regard.watch(model, Patterns(heads=[("cross.0", 1)])) as seen:
        model(**inputs)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).cross_attentions[0]
    torch.testing.assert_close(seen[Patterns].weights("cross.0", 1), expected[0, 1])
    assert seen[Patterns].tokens("cross.0") is None
