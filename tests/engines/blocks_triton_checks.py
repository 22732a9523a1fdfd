"""What the kernels of listed blocks must give; `test_blocks_triton.py` runs it, interpreted or on a GPU."""

import pytest
import torch

from regard.engines import blocks_triton
from regard.engines.blocks import attend_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def draw(length=11, keys=13, heads=4, kv_heads=2, width=5, values=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    sizes = (heads, length, width), (kv_heads, keys, width), (kv_heads, keys, values)
    return [torch.randn(2, *size, generator=generator).to(DEVICE, dtype) for size in sizes]


def index_of(batch, heads, blocks, listed, count):
    """Lists of different blocks in no order, some of them shorter."""
    generator = torch.Generator().manual_seed(blocks)
    index = torch.rand(batch, heads, blocks, count, generator=generator).argsort(-1)[..., :listed]
    return index.masked_fill(torch.rand(index.shape, generator=generator) < 0.3, -1).to(DEVICE)


def rows_of(batch, heads, blocks=3, size=4, length=11):
    """Rows in any order, some twice, some left out, and places without a row."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(batch, heads, blocks, length, generator=generator).argsort(-1)[..., :size]
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.2, -1).to(DEVICE)


def near(rows, keys):
    return (rows - keys).abs() < 6


def outcome(given, backend, call):
    """Output, logsumexp and the gradients of q, k and v, through both."""
    given = [x.clone().requires_grad_() for x in given]
    out, lse = attend_blocks(*given, **call, backend=backend)
    seen = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out.double() / 5).sin().sum() + 0.7 * seen.double().cos().sum()
    return [out, lse, *torch.autograd.grad(loss, given)]


def compare(given, call):
    dtype = given[0].dtype
    found = outcome(given, "triton", call)
    exact = outcome([x.double() for x in given], "torch", call)
    assert found[1].dtype == torch.float32 and all(found[i].dtype == dtype for i in (0, 2, 3, 4))
    for which, (one, other) in enumerate(zip(found, exact, strict=True)):
        assert one.shape == other.shape
        nothing = other == -torch.inf
        assert torch.equal(one == -torch.inf, nothing)
        one, other = (x.double().masked_fill(nothing, 0.0) for x in (one, other))
        assert one.isfinite().all()
        off = ((one - other).abs().max() / other.abs().max().clamp_min(1e-6)).item()
        assert off < BOUND[dtype] * (1 if which < 2 else 5), (which, off)


@pytest.mark.parametrize(
    ("batch", "heads", "visible"), [(1, 1, None), (2, 4, None), (2, 2, near), (1, 4, near)]
)
def test_consecutive_rows(batch, heads, visible):
    index = index_of(batch, heads, 4, 3, 7)
    compare(draw(), {"index": index, "key_block": 2, "query_block": 3, "visible": visible})


@pytest.mark.parametrize(("batch", "heads", "own"), [(1, 2, False), (2, 4, True)])
def test_gathered_rows(batch, heads, own):
    index = index_of(batch, heads, 3, 9, 13)
    rows = rows_of(2, 4) if own else rows_of(1, 1)
    compare(draw(), {"index": index, "rows": rows, "visible": near, "scale": 0.3})


@pytest.mark.parametrize("shape", [(1, 1, 4, 3, 6), (2, 4, 1, 1, 6), (2, 1, 4, 3, 1)])
def test_a_mask_as_a_tensor(shape):
    visible = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(DEVICE)
    call = {"index": index_of(1, 2, 4, 3, 7), "key_block": 2, "query_block": 3}
    compare(draw(), {**call, "visible": visible.expand(*shape[:4], 6)})


def test_a_mask_a_few_query_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr(blocks_triton, "MASK", 100)
    for index in (index_of(2, 4, 4, 3, 7), index_of(1, 1, 4, 3, 7)):
        compare(draw(), {"index": index, "key_block": 2, "query_block": 3, "visible": near})


@pytest.mark.parametrize(("key_block", "query_block"), [(1, 1), (16, 7), (5, 21), (40, 16)])
def test_blocks_of_any_size_and_more_than_a_tile(key_block, query_block):
    length, keys = 21, 85
    index = index_of(1, 2, -(-length // query_block), 2, -(-keys // key_block))
    compare(draw(length, keys), {"index": index, "key_block": key_block, "query_block": query_block})


@pytest.mark.parametrize(("width", "values"), [(1, 1), (16, 33), (130, 5)])
def test_any_width(width, values):
    call = {"index": index_of(1, 1, 2, 2, 3), "key_block": 6, "query_block": 8}
    compare(draw(width=width, values=values), call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_float32(dtype):
    index = index_of(2, 2, 4, 3, 7)
    compare(draw(dtype=dtype), {"index": index, "key_block": 2, "query_block": 3, "visible": near})


def test_without_merging_every_block_has_its_own_softmax():
    call = {"index": index_of(2, 2, 4, 3, 7), "key_block": 2, "query_block": 3, "merge": False}
    compare(draw(), call)


def test_a_row_that_sees_nothing_is_zero_in_both_directions():
    index = torch.full((1, 1, 4, 2), -1, device=DEVICE)
    index[..., :2, 0] = 0
    for visible in (None, lambda i, j: i > 1):
        compare(draw(), {"index": index, "key_block": 2, "query_block": 3, "visible": visible})


def test_a_block_that_is_listed_twice_counts_twice():
    index = torch.tensor([[2, 0, 2, -1]], device=DEVICE).expand(1, 1, 4, 4)
    compare(draw(), {"index": index, "key_block": 2, "query_block": 3})


def test_large_scores_do_not_overflow():
    q, k, v = draw()
    call = {"index": index_of(1, 1, 4, 3, 7), "key_block": 2, "query_block": 3}
    out, lse = attend_blocks(q * 1e4, k, v, **call, backend="triton")
    _, sums = attend_blocks(q.double() * 1e4, k.double(), v.double(), **call, backend="torch")
    assert not out.isnan().any() and not lse.isnan().any()
    some = sums > -torch.inf
    torch.testing.assert_close(lse.double()[some], sums[some], rtol=1e-4, atol=1e-2)


def test_inputs_of_any_layout():
    q, k, v = draw()
    call = {"index": index_of(1, 2, 4, 3, 7), "key_block": 2, "query_block": 3, "backend": "triton"}
    expected = attend_blocks(q, k, v, **call)
    for turned in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        for one, other in zip(attend_blocks(*map(turned, (q, k, v)), **call), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_wrong_kernel_would_be_caught():
    """The control: with the lists of another head the bound is far exceeded."""
    index = index_of(1, 4, 4, 3, 7)
    call = {"key_block": 2, "query_block": 3}
    found = outcome(draw(), "triton", {**call, "index": index})
    other = outcome(draw(), "torch", {**call, "index": index.flip(1)})
    for one, wrong in zip(found, other, strict=True):
        one, wrong = (x.masked_fill(x == -torch.inf, 0.0) for x in (one, wrong))
        assert (one - wrong).abs().max() > 100 * BOUND[torch.float32] * wrong.abs().max()


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_a_gpu_uses_it_by_itself(monkeypatch):
    from regard.engines import blocks

    used, right = [], blocks_triton.attend_triton
    monkeypatch.setattr(blocks, "attend_triton", lambda *given: used.append(given) or right(*given))
    call = {"index": index_of(1, 1, 4, 3, 7), "key_block": 2, "query_block": 3}
    attend_blocks(*draw(), **call)
    assert len(used) == 1
    attend_blocks(*draw(), **call, backend="torch")
    assert len(used) == 1
