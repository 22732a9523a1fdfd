"""Block-sparse attention against a softmax over a dense mask of the same keys."""

import pytest
import torch

from regard.engines import block_tiles
from regard.engines.blocks import attend_blocks, listed_mask, merge_parts
from regard.errors import RegardError, ShapeMismatch


def inputs(length=11, keys=13, heads=4, kv_heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(2, heads, length, 5), draw(2, kv_heads, keys, 5), draw(2, kv_heads, keys, 3)


def index_of(batch, heads, blocks, listed, count, seed=0):
    """Lists of different blocks in no order, some of them shorter."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, heads, blocks, count, generator=generator).argsort(-1)[..., :listed]
    return index.masked_fill(torch.rand(index.shape, generator=generator) < 0.3, -1)


def counts(index, q, keys, key_block, rows):
    """How often each row lists each key, [B, H, Q, R, S], one row and block at a time."""
    batch, heads, blocks = q.shape[0], q.shape[1], index.shape[2]
    found = torch.zeros(batch, heads, blocks, rows.shape[3], keys)
    for b in range(batch):
        for h in range(heads):
            own = index[b if index.shape[0] > 1 else 0, h * index.shape[1] // heads]
            for j in range(blocks):
                for block in own[j].tolist():
                    if block >= 0:
                        found[b, h, j, :, block * key_block : (block + 1) * key_block] += 1
    return found


def naive(q, k, v, index, *, key_block=1, query_block=None, rows=None, visible=None, scale=None):
    """The same by a dense softmax of every row of every query block over all keys."""
    batch, heads, length = q.shape[:3]
    group, by_row = heads // k.shape[1], rows is None
    if rows is None:
        rows = torch.arange(index.shape[2] * query_block).view(1, 1, -1, query_block)
        rows = torch.where(rows < length, rows, -1)
    every = rows.expand(batch, heads, -1, -1)
    listed = counts(index, q, k.shape[2], key_block, rows) * (every >= 0)[..., None]
    if visible is not None:
        listed = listed * visible(every[..., None].clamp_min(0), torch.arange(k.shape[2]))
    some = torch.gather(q, 2, every.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, q.shape[3]))
    scores = some @ k.repeat_interleave(group, 1).transpose(2, 3)
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.view(listed.shape) + listed.clamp_min(1).log()
    scores = scores.masked_fill(listed == 0, -1e9)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * (listed > 0)
    lse = torch.where((listed > 0).any(-1), lse, -torch.inf)
    out = (weights.flatten(2, 3) @ v.repeat_interleave(group, 1)).view(*weights.shape[:4], -1)
    return (out.flatten(2, 3)[:, :, :length], lse.flatten(2, 3)[:, :, :length]) if by_row else (out, lse)


def near(rows, keys):
    return (rows - keys).abs() < 6


def rows_of(batch, heads, blocks=3, size=4, length=11):
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(batch, heads, blocks, length, generator=generator).argsort(-1)[..., :size]
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.2, -1)


def calls():
    """Name -> options of a call on `inputs()`."""
    found = {}
    for batch, heads in ((1, 1), (2, 2), (1, 4), (2, 4)):
        shape = f"{batch}x{heads}"
        found[f"{shape} runs"] = {"index": index_of(batch, heads, 4, 3, 7), "key_block": 2, "query_block": 3}
        found[f"{shape} seen"] = {**found[f"{shape} runs"], "visible": near}
        index = index_of(batch, heads, 3, 9, 13)
        found[f"{shape} rows"] = {"index": index, "rows": rows_of(1, 1), "visible": near}
        found[f"{shape} own"] = {"index": index, "rows": rows_of(2, 4), "scale": 0.3}
    found["few"] = {"index": index_of(2, 4, 1, 2, 7), "key_block": 2, "query_block": 11, "visible": near}
    found["few shared"] = {"index": index_of(1, 1, 1, 3, 13), "query_block": 11}
    return found


CALLS = calls()


def same(found, expected, bound=1e-11):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("piece", [1, 300, 2**19])
@pytest.mark.parametrize("name", CALLS)
def test_lists_equal_a_dense_softmax(name, piece, monkeypatch):
    monkeypatch.setitem(block_tiles.PIECE, "cpu", piece)
    same(attend_blocks(*inputs(), **CALLS[name]), naive(*inputs(), **CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_both_results_equal_those_of_a_dense_softmax(name, monkeypatch):
    monkeypatch.setitem(block_tiles.PIECE, "cpu", 400)
    gradients = []
    for function in (attend_blocks, naive):
        given = [x.requires_grad_() for x in inputs()]
        out, lse = function(*given, **CALLS[name])
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        seen = torch.where(lse == -torch.inf, 0.0, lse)
        loss = (out * weights).sum() + (seen * weights[..., 0] * 0.7).sum()
        gradients.append(torch.autograd.grad(loss, given))
    same(*gradients)


@pytest.mark.parametrize("name", CALLS)
def test_without_merging_every_block_has_its_own_softmax_and_parts_join_to_the_whole(name):
    call, (q, k, v) = CALLS[name], inputs()
    out, lse = attend_blocks(q, k, v, **call, merge=False)
    listed = call["index"].shape[3]
    for i in range(listed):
        only = {**call, "index": call["index"][..., i : i + 1]}
        same((out[..., i, :], lse[..., i]), naive(q, k, v, **only))
    same(merge_parts(*((out[..., i, :], lse[..., i]) for i in range(listed))), attend_blocks(q, k, v, **call))


@pytest.mark.parametrize("merge", [True, False])
def test_visible_as_a_tensor_says_the_same_as_a_function(merge):
    q, k, v = inputs()
    for name in ("1x1 seen", "2x4 seen", "2x2 rows", "few"):
        call = {**CALLS[name], "merge": merge}
        size, count = call.get("query_block"), call.get("key_block", 1)
        rows = call.get("rows")
        if rows is None:
            rows = torch.arange(size * call["index"].shape[2]).view(1, 1, -1, size)
        keys = (call["index"].clamp_min(0)[..., None] * count + torch.arange(count)).flatten(3)
        keys = keys if keys.shape[1] != 2 else keys.repeat_interleave(2, 1)
        mask = near(rows.clamp_min(0)[..., None], keys[..., None, :])
        same(attend_blocks(q, k, v, **{**call, "visible": mask}), attend_blocks(q, k, v, **call))


def test_what_is_clear_is_not_asked_about(monkeypatch):
    q, k, v = inputs(length=12, keys=13)
    index = torch.arange(4).expand(1, 4, 3, -1)
    asked = []

    def visible(rows, keys):
        asked.append(keys)
        return keys <= rows + 6

    for piece in (1, 2**20):
        monkeypatch.setitem(block_tiles.PIECE, "cpu", piece)
        whole = attend_blocks(q, k, v, index, key_block=3, query_block=4, visible=visible)
        asked.clear()
        found = attend_blocks(q, k, v, index, key_block=3, query_block=4, visible=visible, clear=2)
        torch.testing.assert_close(found, whole)
        assert asked and all(keys.min() == 6 and keys.shape[-1] == 6 for keys in asked)


def test_all_blocks_listed_is_dense_causal_attention_and_its_gradients():
    q, k, v = (x.requires_grad_() for x in inputs(length=13))
    index = torch.arange(7).view(1, 1, 1, -1).expand(1, 1, 4, -1)
    out, _ = attend_blocks(q, k, v, index, key_block=2, query_block=4, visible=lambda i, j: j <= i)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same((out,), (dense,))
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    same(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, dense)))


def test_a_row_that_sees_nothing_is_zero_with_no_nan_in_either_direction():
    q, k, v = (x.requires_grad_() for x in inputs())
    index = torch.full((1, 1, 4, 2), -1)
    index[..., :2, 0] = 0
    for visible in (None, lambda i, j: i > 1):
        out, lse = attend_blocks(q, k, v, index, key_block=2, query_block=3, visible=visible)
        unseen = torch.arange(11) >= 6
        if visible is not None:
            unseen[:2] = True
        assert (out[:, :, unseen] == 0).all() and (lse[:, :, unseen] == -torch.inf).all()
        assert lse[:, :, ~unseen].isfinite().all()
        whole, _ = merge_parts((out, lse), attend_blocks(q, k, v, index, key_block=2, query_block=3))
        found = torch.autograd.grad(whole.square().sum(), (q, k, v))
        assert all(x.isfinite().all() for x in found)
        assert (found[0][:, :, 6:] == 0).all() and found[0][:, :, 2:6].abs().min() > 0


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in inputs(length=5, keys=6))
    index = index_of(2, 4, 2, 2, 3)
    seen = torch.rand(1, 1, 2, 3, 4, generator=torch.Generator().manual_seed(3)) < 0.7
    seen[..., 0] = True
    index[..., 0] = 1

    def both(*given):
        return attend_blocks(*given, index, key_block=2, query_block=3, visible=seen)

    assert torch.autograd.gradcheck(both, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_rounding(dtype):
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for name in ("2x2 seen", "2x4 own", "few"):
        rounded = [x.to(dtype).requires_grad_() for x in inputs()]
        exact = [x.detach().double().requires_grad_() for x in rounded]
        found, expected = (attend_blocks(*x, **CALLS[name]) for x in (rounded, exact))
        assert found[0].dtype == dtype and found[1].dtype == torch.float32
        same((x.double() for x in found), expected, bound)
        gradients = [
            torch.autograd.grad(out.double().square().sum(), x)
            for (out, _), x in ((found, rounded), (expected, exact))
        ]
        assert all(x.dtype == dtype for x in gradients[0])
        same((x.double() for x in gradients[0]), gradients[1], 4 * bound)


def test_large_scores_neither_overflow_nor_lose_the_largest():
    q, k, v = inputs(dtype=torch.float32)
    call = CALLS["1x1 runs"]
    out, lse = attend_blocks(q * 1e4, k, v, **call)
    sums = naive(q.double() * 1e4, k.double(), v.double(), **call)[1]
    assert not out.isnan().any()
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-3)


def test_empty_calls_answer_nothing():
    q, k, v = inputs(length=0)
    out, lse = attend_blocks(q, k, v, torch.zeros(1, 1, 0, 2, dtype=torch.int64))
    assert out.shape == (2, 4, 0, 3) and lse.shape == (2, 4, 0)
    q, k, v = inputs(length=3)
    for index, keys in ((torch.zeros(1, 1, 1, 0), 13), (torch.full((1, 1, 1, 2), -1), 0)):
        out, lse = attend_blocks(q, k[:, :, :keys], v[:, :, :keys], index.long(), query_block=3)
        assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = attend_blocks(q, k, v, torch.zeros(1, 1, 1, 0).long(), query_block=3, merge=False)
    assert out.shape == (2, 4, 3, 0, 3) and lse.shape == (2, 4, 3, 0)


def test_tensors_of_any_layout_are_read_and_none_is_changed():
    q, k, v = inputs()
    for name in ("2x4 runs", "2x2 rows", "few"):
        call = CALLS[name]
        apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        before = [x.clone() for x in (*apart, call["index"])]
        same(attend_blocks(*apart, **call), attend_blocks(q, k, v, **call), 1e-12)
        assert all(torch.equal(a, b) for a, b in zip((*apart, call["index"]), before, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"index": torch.full((1, 1, 4, 2), 7)}, RegardError, "index lists 7 to 7; there are 0 to 6"),
        ({"index": torch.full((1, 1, 4, 2), -2)}, RegardError, "index lists -2 to -2"),
        ({"index": torch.zeros(1, 3, 4, 2).long()}, ShapeMismatch, "1 or 2 or 4, query blocks, n"),
        ({"index": torch.zeros(1, 1, 4, 2)}, ShapeMismatch, "index is float32"),
        ({"index": torch.zeros(1, 1, 5, 2).long()}, ShapeMismatch, "lists 5 query blocks, and there are 4"),
        ({"rows": torch.zeros(1, 1, 4, 2).long()}, RegardError, "both rows and query_block"),
        ({"key_block": 0}, RegardError, "both must be at least 1"),
        ({"visible": torch.ones(1, 1, 4, 3, 5).bool()}, ShapeMismatch, "visible is bool"),
        ({"visible": torch.ones(1, 1, 4, 3, 4)}, ShapeMismatch, "visible is float32"),
    ],
)
def test_a_wrong_call_is_refused(change, error, words):
    call = {"index": torch.zeros(1, 1, 4, 2).long(), "key_block": 2, "query_block": 3, **change}
    with pytest.raises(error, match=words):
        attend_blocks(*inputs(), **call)


def test_wrong_tensors_are_refused():
    q, k, v = inputs()
    index = torch.zeros(1, 1, 11, 2).long()
    with pytest.raises(ShapeMismatch, match="must divide"):
        attend_blocks(q[:, :3], k, v, index)
    with pytest.raises(ShapeMismatch, match=r"\[batch, heads, time, dim\]"):
        attend_blocks(q[0], k, v, index)
    with pytest.raises(RegardError, match="at least one"):
        merge_parts()


def test_the_mask_of_listed_keys_is_what_is_counted():
    q, k, _ = inputs()
    for name in ("2x4 runs", "1x1 runs"):
        index, rows = CALLS[name]["index"], torch.arange(12).view(1, 1, 4, 3)
        expected = counts(index.expand(2, -1, -1, -1), q, k.shape[2], 2, rows).flatten(2, 3) > 0
        for start, stop in ((0, 11), (4, 5), (2, 9), (3, 3)):
            found = listed_mask(index, start, stop, k.shape[2], key_block=2, query_block=3)
            assert torch.equal(found.expand(2, 4, -1, -1), expected[:, :, start:stop])
