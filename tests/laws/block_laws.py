"""What every block, a mechanism without queries, keys and values, must satisfy."""

import pytest
import torch

from regard.errors import RegardError
from tests.laws.laws import BFLOAT16, EXACT, FLOAT32, near

LIKE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def given(block):
    return block.example(torch.Generator().manual_seed(0))


def block_law_reference(spec):
    """`forward` is the definition."""
    block = spec.build().double()
    near(block(given(block)), block.reference(given(block)))


def block_law_gradient(spec):
    """Gradients of x and of parameters are those of the definition."""
    block = spec.build().double()
    x = given(block).requires_grad_()
    wanted = [x, *block.parameters()]
    found, expected = (torch.autograd.grad(out.sin().sum(), wanted) for out in (block(x), block.reference(x)))
    for one, other in zip(found, expected, strict=True):
        near(one, other, 100 * EXACT)
        assert other.abs().sum() > 0, "a gradient of nothing but zeros"


def block_law_causal(spec):
    """No later input moves an earlier output."""
    block = spec.build().double()
    x = given(block)
    for cut in range(1, x.shape[1], 3):
        after = block(torch.cat([x[:, :cut], x[:, cut:].flip(1) + 1], 1))
        near(after[:, :cut], block(x)[:, :cut])
        assert not torch.equal(after[:, cut:], block(x)[:, cut:])


def block_law_batch(spec):
    """A batch equals its items one by one."""
    block = spec.build().double()
    x = given(block)
    near(block(x), torch.cat([block(x[i : i + 1]) for i in range(len(x))]))


def block_law_precision(spec):
    """float32 and bfloat16 stay within bounds of float64, and come out as they went in."""
    block = spec.build()
    for dtype, bound in LIKE.items():
        low = given(block).to(dtype)
        found = block.to(dtype)(low)
        assert found.dtype == dtype
        near(found, block.double()(low.double()), bound)


def block_law_shown(spec):
    """What a block shows is what its `shows`, kind and grids promise, item by item and query by query."""
    block = spec.build().double().eval()
    x = given(block)
    {"maps": _maps_hold, "rows": _rows_hold}[block.shows](block, x)


def _maps_hold(block, x):
    found = block.maps(x)
    near(found.values, torch.cat([block.maps(x[i : i + 1]).values for i in range(len(x))]))
    assert len(found.values) == len(x) and found.values.isfinite().all()
    if found.kind != "gate":
        assert (found.values >= 0).all()
    if found.kind == "probability":
        near(found.values.sum((2, 3)), torch.ones_like(found.values[:, :, 0, 0]))
    assert found.values.std() > 0, "a map without differences"


def _rows_hold(block, x):
    queries, keys = block.grids(x)
    count = queries[0] * queries[1]
    rows = block.rows(x, torch.arange(count))
    assert rows.shape[0] == len(x) and rows.shape[2:] == (count, keys[0] * keys[1])
    assert (rows >= 0).all() and (rows.sum(-1) <= 1 + EXACT).all() and (rows.sum(-1) > 0).all()
    chosen = torch.tensor([count - 1, 0, count // 2])
    near(block.rows(x, chosen), rows[:, :, chosen])
    near(rows, torch.cat([block.rows(x[i : i + 1], torch.arange(count)) for i in range(len(x))]))
    for wrong in (count, -1):
        with pytest.raises(RegardError, match="queries go from"):
            block.rows(x, [0, wrong])


BLOCK_LAWS = {
    n.removeprefix("block_law_"): f for n, f in list(globals().items()) if n.startswith("block_law")
}


def block_law_applies(law, spec):
    if law == "shown":
        return spec.build().shows is not None
    return law != "causal" or spec.module.causal
