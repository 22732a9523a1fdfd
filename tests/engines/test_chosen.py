"""Attention of chosen rows is attention of all, without the others; and the others are not computed."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.attention import Context
from regard.engines import chosen as engine
from regard.engines.chosen import attend_chosen
from regard.engines.masks import TensorMask, WindowMask
from regard.errors import RegardError, ShapeMismatch

EAGER = {"least": (2, 1), "most": 1.0}


def given(queries, keys=None, heads=4, kv_heads=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries), (kv_heads, keys or queries), (kv_heads, keys or queries)
    q, k, v = (torch.randn(batch, h, t, 8, generator=generator, dtype=torch.float64) for h, t in shapes)
    on = torch.rand(batch, heads, queries, generator=generator) < 0.4
    on[:, 0], on[0, 1], on[-1, 2] = True, False, True
    return q, k, v, on


def dense(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (37, 37), (5, 29), (1, 33), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_rows(kv_heads, queries, keys, padded):
    q, k, v, on = given(queries, keys, kv_heads=kv_heads)
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[0, : keys // 3] = not padded
    ctx = Context.of(q, k, valid=valid if padded else None)
    rows = torch.arange(queries)[:, None] + keys - queries >= torch.arange(keys)
    mask = rows & valid[:, None, None] if padded else rows
    expected = torch.where(on[..., None], dense(q, k, v, mask), 0.0)
    for options in ({}, {"offset": ctx.offset, "valid": ctx.valid_keys}):
        found = attend_chosen(ctx.inputs(q, k, v), on, **EAGER, **options)
        keep = mask.any(-1).expand(*on.shape)
        torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=1e-12)
        assert not found[~on].any()


def test_other_masks():
    q, k, v, on = given(31, heads=4, kv_heads=4)
    ctx = Context.of(q, k)
    window = WindowMask(ctx.mask, 5, 0)
    for mask in (window, TensorMask(torch.randn(2, 4, 31, 31).double(), 31, 31)):
        x = ctx.inputs(q, k, v)
        x.mask = mask
        wanted = mask.rows(0, 31, 0, 31)
        found = attend_chosen(x, on, **EAGER)
        expected = torch.where(on[..., None], dense(q, k, v, wanted), 0.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        one = Context.of(q[:, :, -1:], k).inputs(q[:, :, -1:], k, v)
        one.mask = TensorMask(wanted[..., -1:, :], 1, 31)
        torch.testing.assert_close(
            attend_chosen(one, on[:, :, -1:], **EAGER), expected[:, :, -1:], rtol=0, atol=1e-12
        )
    whole = Context.of(q, k, causal=False).inputs(q, k, v)
    expected = torch.where(on[..., None], dense(q, k, v, None), 0.0)
    torch.testing.assert_close(attend_chosen(whole, on, **EAGER), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_are_those_of_all_rows(kv_heads):
    q, k, v, on = given(41, kv_heads=kv_heads)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    causal = torch.ones(41, 41, dtype=torch.bool).tril()
    expected = torch.where(on[..., None], dense(q, k, v, causal), 0.0)
    found = attend_chosen(Context.of(q, k).inputs(q, k, v), on, offset=0, **EAGER)
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), tensors),
        torch.autograd.grad(expected.sin().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
def test_rows_that_are_off_are_not_computed(monkeypatch, trained):
    counted = []
    name, where = ("attend_reshaped", engine) if trained else ("scaled_dot_product_attention", engine.F)
    real = getattr(where, name)

    def counting(*args, **options):
        q = args[0].q if trained else args[0]
        counted.append(q.shape[1] * q.shape[2])
        return real(*args, **options)

    monkeypatch.setattr(where, name, counting)
    q, k, v, _ = given(200, kv_heads=4, batch=1)
    q.requires_grad_(trained)
    for share in (1, 2, 3):
        on = torch.zeros(1, 4, 200, dtype=torch.bool)
        on[:, :share, ::4] = True
        attend_chosen(Context.of(q, k).inputs(q, k, v), on, offset=0)
    assert counted == [50, 100, 150]
    poisoned = k.clone()
    poisoned[:, 3] = torch.nan
    out = attend_chosen(Context.of(q, k).inputs(q, poisoned, v), on, offset=0)
    last = Context.of(q[:, :, -4:-3], k[:, :, :-3]).inputs(q[:, :, -4:-3], poisoned[:, :, :-3], v[:, :, :-3])
    assert out.isfinite().all()
    assert attend_chosen(last, on[:, :, -4:-3], **EAGER).isfinite().all()


def test_heads_of_which_most_rows_are_chosen_go_as_they_are(monkeypatch):
    sizes = []
    real = engine.F.scaled_dot_product_attention
    q, k, v, _ = given(200, kv_heads=4, batch=1)
    on = torch.zeros(1, 4, 200, dtype=torch.bool)
    on[:, 0], on[:, 1, :150], on[:, 2, ::4] = True, True, True
    expected = torch.where(on[..., None], dense(q, k, v, torch.ones(200, 200, dtype=torch.bool).tril()), 0.0)
    monkeypatch.setattr(
        engine.F, "scaled_dot_product_attention",
        lambda q, *a, **o: sizes.append(tuple(q.shape[1:3])) or real(q, *a, **o),
    )  # fmt: skip
    found = attend_chosen(Context.of(q, k).inputs(q, k, v), on, offset=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert sizes == [(2, 200), (1, 50)]
    sizes.clear()
    on[:, 2:, :150] = True
    assert attend_chosen(Context.of(q, k).inputs(q, k, v), on, offset=0)[~on].abs().max() == 0
    assert [rows for _, rows in sizes] == [200]


def test_nothing_chosen_and_everything_chosen():
    q, k, v, on = given(40, kv_heads=4)
    x = Context.of(q, k).inputs(q, k, v)
    assert not attend_chosen(x, torch.zeros_like(on), offset=0, **EAGER).any()
    everything = attend_chosen(x, torch.ones_like(on), offset=0, **EAGER)
    expected = dense(q, k, v, torch.ones(40, 40, dtype=torch.bool).tril())
    torch.testing.assert_close(everything, expected, rtol=0, atol=1e-12)


def test_half_precision():
    q, k, v, on = given(150, kv_heads=2)
    expected = attend_chosen(Context.of(q, k).inputs(q, k, v), on, offset=0)
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float32, 1e-5)):
        low = [t.to(dtype) for t in (q, k, v)]
        found = attend_chosen(Context.of(*low[:2]).inputs(*low), on, offset=0)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


def test_refusals():
    q, k, v, on = given(5)
    x = Context.of(q, k).inputs(q, k, v)
    with pytest.raises(ShapeMismatch, match=r"chosen must be bool \[2, 4, 5\]"):
        attend_chosen(x, on[:, :2])
    with pytest.raises(ShapeMismatch, match="chosen must be bool"):
        attend_chosen(x, on.float())
    x.softcap = 30.0
    with pytest.raises(RegardError, match="soft-cap"):
        attend_chosen(x, on)
