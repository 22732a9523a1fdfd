"""Attention by narrow blocks of rows against all rows at once."""

from dataclasses import replace

import pytest
import torch

from regard.engines import bands
from regard.engines.bands import attend_by_blocks
from regard.engines.masks import CausalMask, Mask, PaddedMask, TensorMask, WindowMask
from regard.engines.rows import AttentionInputs, attend

LENGTH = 37


def call(mask, heads=4, kv_heads=2, length=LENGTH, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, length, 8, generator=generator, dtype=dtype)
    k = torch.randn(2, kv_heads, mask.keys, 8, generator=generator, dtype=dtype)
    v = torch.randn(2, kv_heads, mask.keys, 6, generator=generator, dtype=dtype)
    return AttentionInputs(q, k, v, mask, 0.3, **options)


VALID = torch.ones(2, LENGTH, dtype=torch.bool)
VALID[0, :9] = False
MASKS = {
    "window": WindowMask(CausalMask(LENGTH, LENGTH), 5),
    "both": WindowMask(Mask(LENGTH, LENGTH), 5, both=True),
    "causal": CausalMask(LENGTH, LENGTH),
    "all": Mask(LENGTH, LENGTH),
    "padded": WindowMask(PaddedMask(CausalMask(LENGTH, LENGTH), VALID), 5),
    "tensor": WindowMask(TensorMask(VALID[:, None, None], LENGTH, LENGTH), 5, both=True),
    "additive": WindowMask(TensorMask(torch.randn(2, 1, LENGTH, LENGTH), LENGTH, LENGTH), 5, both=True),
}
EXTRAS = {
    "plain": {},
    "bias": {"bias": torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64)},
    "bias-of-keys": {"bias": torch.randn(2, 1, 1, LENGTH, dtype=torch.float64)},
    "softcap": {"softcap": 0.5},
    "sinks": {"sink_logits": torch.randn(4, dtype=torch.float64)},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", MASKS)
def test_blocks_equal_all_rows_at_once(name, extra):
    x = call(MASKS[name], **EXTRAS[extra])
    if name == "additive":
        x = replace(
            x, mask=WindowMask(TensorMask(MASKS[name].base.tensor.double(), LENGTH, LENGTH), 5, both=True)
        )
    whole = attend(x)
    real = VALID if "tensor" in name or "padded" in name else torch.ones_like(VALID)
    for rows in (1, 4, 36, 37, 64):
        out = attend_by_blocks(x, rows)
        assert torch.isfinite(out).all()
        off = (out - whole).transpose(1, 2)[real].abs().max()
        assert off < 1e-6 if extra in ("softcap", "sinks") else off < 1e-12


def test_gradients_equal_those_of_all_rows():
    x = call(MASKS["window"])
    given = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    one, other = (torch.autograd.grad(out.sin().sum(), given) for out in (attend_by_blocks(x, 8), attend(x)))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_block_is_given_a_key_that_none_of_its_rows_sees(monkeypatch):
    seen = []
    monkeypatch.setattr(bands, "attend", lambda x: seen.append((x.q.shape[2], x.k.shape[2])) or attend(x))
    attend_by_blocks(call(MASKS["window"]), 8)
    assert seen == [(8, 8), (8, 12), (8, 12), (8, 12), (5, 9)]


@pytest.mark.parametrize("length", [0, 1])
def test_few_rows(length):
    mask = WindowMask(CausalMask(length, LENGTH, LENGTH - length), 3, LENGTH - length)
    out = attend_by_blocks(call(mask, length=length), 8)
    assert out.shape == (2, 4, length, 6)
    if length:
        near = slice(LENGTH - 3, None)
        x = call(mask, length=1)
        expected = attend(replace(x, k=x.k[:, :, near], v=x.v[:, :, near], mask=Mask(1, 3)))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
