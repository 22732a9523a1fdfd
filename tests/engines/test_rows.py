"""Attention by row blocks against the definition."""

import math
from dataclasses import replace

import pytest
import torch

from regard.engines import rows as engine
from regard.engines.masks import CausalMask, Mask, TensorMask
from regard.engines.rows import AttentionInputs, attend, expand_heads, mix, row_blocks, softmax
from tests.engines.dense import attention, causal, window

B, H, T, S, D, DV = 2, 4, 7, 9, 8, 6


def drawn(kv_heads=2, queries=T, keys=S, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(B, H, queries, D), draw(B, kv_heads, keys, D), draw(B, kv_heads, keys, DV)


def bias(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def padded():
    """The last key of the first sequence and the first two of the second are hidden."""
    keep = torch.ones(B, 1, T, S, dtype=torch.bool)
    keep[0, :, :, -1] = False
    keep[1, :, :, :2] = False
    return keep


ALL = torch.ones(1, 1, T, S, dtype=torch.bool)
NARROW = window(T, S, 3, 2) & causal(T, S, 2)
ADDED = bias(B, 1, T, S)
CASES = {
    "all": (Mask(T, S), ALL, {}),
    "causal": (CausalMask(T, S, 2), causal(T, S, 2), {}),
    "causal-square": (CausalMask(T, T), causal(T, T), {}),
    "window": (TensorMask(NARROW, T, S), NARROW, {}),
    "padded": (TensorMask(padded() & causal(T, S, 2), T, S), padded() & causal(T, S, 2), {}),
    "added": (TensorMask(ADDED, T, S), ALL, {"added": ADDED}),
    "softcap": (CausalMask(T, S, 2), causal(T, S, 2), {"softcap": 0.7}),
    "sinks": (CausalMask(T, S, 2), causal(T, S, 2), {"sinks": bias(H)}),
    "sinks-a-row": (CausalMask(T, S, 2), causal(T, S, 2), {"sinks": bias(B, H, T, 1)}),
    "sinks-softcap": (TensorMask(NARROW, T, S), NARROW, {"sinks": bias(H), "softcap": 1.5}),
    "bias": (CausalMask(T, S, 2), causal(T, S, 2), {"bias": bias(B, H, T, S)}),
    "bias-a-head": (TensorMask(NARROW, T, S), NARROW, {"bias": bias(1, H, T, S)}),
    "bias-a-key": (TensorMask(padded(), T, S), padded(), {"bias": bias(1, 1, 1, S)}),
    "bias-and-all": (Mask(T, S), ALL, {"bias": bias(1, H, 1, S), "softcap": 2.0, "sinks": bias(H)}),
}


def case(name, **options):
    """The inputs of a case, and scores, weights and outputs by the definition."""
    mask, visible, more = CASES[name]
    q, k, v = drawn(keys=mask.keys, **options)
    call = AttentionInputs(
        q, k, v, mask, 0.3, softcap=more.get("softcap"), bias=more.get("bias"), sink_logits=more.get("sinks")
    )
    return call, attention(q, k, v, visible, 0.3, **more)


def gathered(x, **options):
    """Scores, weights and outputs of all blocks, in one tensor each; keys out of bounds are -inf and 0."""
    heads = options.get("heads")
    count = x.heads if heads is None else len(heads)
    start, stop = options.get("rows") or (0, x.q.shape[2])
    scores = torch.full((x.q.shape[0], count, stop - start, x.k.shape[2]), float("-inf"))
    weights = torch.zeros_like(scores)
    outputs, last = [], start
    for block in row_blocks(x, **options):
        assert block.start == last
        assert block.scores.dtype == torch.float32
        softmax(x, block)
        here = (slice(None), slice(None), slice(block.start - start, block.stop - start))
        scores[(*here, slice(block.key_start, block.key_stop))] = block.scores
        weights[(*here, slice(block.key_start, block.key_stop))] = block.weights
        outputs.append(mix(x, block))
        last = block.stop
    assert last == stop
    return scores, weights, torch.cat(outputs, 2)


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_the_definition(name, size, kv_heads):
    x, (scores, weights, outputs) = case(name, kv_heads=kv_heads)
    found = gathered(x, block_rows=size)
    hidden = scores.isinf()
    assert (found[0][hidden] < -1e30).all()
    close(found[0][~hidden], scores[~hidden])
    close(found[1], weights)
    close(found[2], outputs)
    close(attend(x), outputs)


@pytest.mark.parametrize("heads", [[0], [3, 1], [1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("span", [None, (2, 5), (6, 7)])
@pytest.mark.parametrize("name", ["causal", "window", "sinks-softcap", "sinks-a-row", "bias", "bias-and-all"])
def test_some_heads_and_rows(name, heads, span):
    x, (_, weights, outputs) = case(name)
    index = torch.tensor(heads)
    start, stop = span or (0, T)
    found = gathered(x, heads=index, rows=span, block_rows=2)
    close(found[1], weights[:, index, start:stop])
    close(found[2], outputs[:, index, start:stop])


@pytest.mark.parametrize("name", CASES)
def test_blocks_and_attend_in_bfloat16(name):
    x, (_, weights, outputs) = case(name, dtype=torch.bfloat16)
    found = gathered(x, block_rows=3)
    assert found[1].dtype == torch.float32
    assert found[2].dtype == attend(x).dtype == torch.bfloat16
    close(found[1], weights, 3e-2)
    close(found[2], outputs, 5e-2)
    close(attend(x), outputs, 5e-2)


@pytest.mark.parametrize("name", CASES)
def test_float64_takes_its_softmax_in_float32(name):
    x, (_, weights, outputs) = case(name, dtype=torch.float64)
    found = gathered(x, block_rows=3)
    assert found[2].dtype == torch.float64
    close(found[1], weights, 1e-6)
    close(found[2], outputs, 1e-5)
    close(attend(x), outputs, 1e-5)


@pytest.mark.parametrize("way", ["blocks", "attend"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_definition(name, way):
    mask, visible, more = CASES[name]
    leaves = {n: t.clone().requires_grad_() for n, t in more.items() if n in ("bias", "sinks")}
    q, k, v = (t.requires_grad_() for t in drawn(keys=mask.keys))
    given = {**more, **leaves}
    x = AttentionInputs(q, k, v, mask, 0.3, given.get("softcap"), given.get("bias"), given.get("sinks"))
    found = attend(x) if way == "attend" else gathered(x, block_rows=2)[2]
    expected = attention(q, k, v, visible, 0.3, **given)[2]
    direction = torch.randn(found.shape)
    wanted = [q, k, v, *leaves.values()]
    first = torch.autograd.grad((found * direction).sum(), wanted)
    second = torch.autograd.grad((expected * direction).sum(), wanted)
    for one, other in zip(first, second, strict=True):
        assert other.abs().max() > 1e-3
        close(one, other, 1e-4)


def test_a_row_that_sees_nothing_is_even_and_finite():
    visible = causal(T, S, -3)
    x = AttentionInputs(*drawn(), TensorMask(visible, T, S), 0.3)
    weights = gathered(x, block_rows=T)[1]
    seen = visible.any(-1)[0, 0]
    assert seen.tolist() == [False] * 3 + [True] * 4
    width = x.mask.bounds(0, T)[1]
    assert torch.allclose(weights[:, :, ~seen, :width], torch.tensor(1 / width))
    expected = attention(x.q, x.k, x.v, visible, 0.3)[1]
    close(weights[:, :, seen], expected[:, :, seen])
    assert attend(x).isfinite().all()


@pytest.mark.parametrize("queries", [0, 1])
def test_no_rows_and_one_row(queries):
    q, k, v = drawn(queries=queries)
    for more in ({}, {"softcap": 2.0}):
        x = AttentionInputs(q, k, v, Mask(queries, S), 0.3, **more)
        found = attend(x)
        expected = attention(q, k, v, ALL[:, :, :queries], 0.3, **more)[2]
        assert found.shape == (B, H, queries, DV)
        assert torch.allclose(found.double(), expected, atol=1e-5)
    assert len(list(row_blocks(x))) == queries


def test_an_empty_range_of_rows_has_no_blocks():
    x, _ = case("causal")
    assert list(row_blocks(x, rows=(3, 3))) == []


def test_heads_are_repeated_next_to_one_another():
    x = torch.arange(2.0).view(1, 2, 1, 1)
    assert expand_heads(x, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert expand_heads(x, 2) is x
    call, _ = case("all", kv_heads=2)
    k, v = call.expand()
    assert torch.equal(k[:, 1], call.k[:, 0])
    assert torch.equal(v[:, 2], call.v[:, 1])
    assert (call.heads, call.kv_heads) == (H, 2)


def test_dropout_falls_on_the_weights_that_mix_values():
    x, (_, weights, _) = case("causal")
    x = replace(x, dropout=0.5)
    (block,) = row_blocks(x, block_rows=T)
    softmax(x, block)
    close(block.weights, weights)
    torch.manual_seed(3)
    found = mix(x, block)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(block.weights, 0.5)
    assert (dropped == 0).sum() > (block.weights == 0).sum()
    close(found, dropped.double() @ x.expand()[1].double())


def test_memory_is_shared_between_blocks_unless_autograd_needs_it():
    x, _ = case("causal")

    def places(**options):
        return {block.scores.data_ptr() for block in row_blocks(x, block_rows=1, **options)}

    kept = [block.scores for block in row_blocks(x, block_rows=1, reuse=False)]
    assert len({scores.data_ptr() for scores in kept}) == T
    assert len(places()) == 1
    x.q.requires_grad_()
    held = [block.scores for block in row_blocks(x, block_rows=1)]
    assert len({scores.data_ptr() for scores in held}) == T
    with torch.no_grad():
        assert len(places()) == 1


def test_blocks_fit_the_bytes_allowed(monkeypatch):
    q, k, v = drawn(queries=100, keys=100)
    x = AttentionInputs(q, k, v, CausalMask(100, 100), 0.3)
    monkeypatch.setattr(engine, "MAX_ROWS", 48)
    assert [block.stop - block.start for block in row_blocks(x)] == [48, 48, 4]
    monkeypatch.undo()
    monkeypatch.setitem(engine.BLOCK_BYTES, "cpu", 4 * B * H * 100 * 32)
    sizes = [block.stop - block.start for block in row_blocks(x)]
    assert sum(sizes) == 100
    assert all(size % engine.MIN_ROWS == 0 for size in sizes[:-1])
    monkeypatch.setitem(engine.BLOCK_BYTES, "cpu", 1)
    assert {block.stop - block.start for block in row_blocks(x)} == {engine.MIN_ROWS, 100 % engine.MIN_ROWS}


@pytest.mark.parametrize("name", ["causal", "sinks", "padded"])
@pytest.mark.parametrize("edited", [False, True])
def test_statistics_of_a_block(name, edited):
    x, (scores, weights, _) = case(name)
    valid = torch.rand(B, T) > 0.3
    for block in row_blocks(x, block_rows=3):
        softmax(x, block)
        block.call = x
        block.valid_rows = valid[:, block.start : block.stop]
        expected = weights[:, :, block.start : block.stop, block.key_start : block.key_stop]
        if edited:
            assert (block.row_sum <= 1 + 1e-6).all()
            expected = expected * 0.5
            block.weights = block.weights * 0.5
        close(block.row_sum, expected.sum(-1))
        close(block.column_sum, (expected * block.valid_rows[:, None, :, None]).sum(2))
        close(block.entropy, -torch.xlogy(expected, expected).sum(-1), 1e-4)
        each = torch.logsumexp(scores[:, :, block.start : block.stop], -1)
        if name == "sinks" and not edited:
            sinks = x.sink_logits.double()[None, :, None]
            each = torch.logaddexp(each, sinks.expand_as(each))
        if name != "sinks" or not edited:
            close(block.logsumexp, each, 1e-4)


def test_weights_come_after_the_softmax():
    x, _ = case("all")
    block = next(iter(row_blocks(x)))
    with pytest.raises(AttributeError, match="only after the softmax"):
        _ = block.weights


def test_scale_and_large_scores_stay_finite():
    q, k, v = drawn()
    x = AttentionInputs(q * 1e4, k * 1e3, v, CausalMask(T, S, 2), 1.0)
    weights = gathered(x, block_rows=2)[1]
    assert weights.isfinite().all()
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    assert math.isclose(float(weights.max()), 1.0, rel_tol=1e-6)
